"""The pipeline for a Kubernetes cluster: platform files, where each step runs, the YAML."""
