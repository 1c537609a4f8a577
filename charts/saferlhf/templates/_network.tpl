{{/* Rules that several network policies share. Argument: root. */}}

{{- define "saferlhf.toS3" -}}
{{- if .Values.seaweedfs.enabled -}}
- to: [{podSelector: {matchLabels: {app.kubernetes.io/part-of: saferlhf, app.kubernetes.io/component: seaweedfs}}}]
  ports: [{port: 8333}]
{{- else -}}
- to: {{- toYaml .Values.networkPolicy.s3.to | nindent 4 }}
  ports: [{port: {{ .Values.networkPolicy.s3.port }}}]
  {{- if and (not .Values.s3.existingSecret) (not .Values.s3.endpoint) }}
# AWS: the IAM role is asked for at STS.
- to: [{ipBlock: {cidr: 0.0.0.0/0}}]
  ports: [{port: 443}]
  {{- end }}
{{- end }}
{{- end }}

{{- define "saferlhf.toMlflow" -}}
{{- if .Values.mlflow.enabled -}}
- to: [{podSelector: {matchLabels: {app.kubernetes.io/part-of: saferlhf, app.kubernetes.io/component: mlflow}}}]
  ports: [{port: 5000}]
{{- else -}}
{{- $url := urlParse .Values.mlflow.trackingUri }}
# An MLflow server of somebody else, wherever it is.
- ports: [{port: {{ (splitList ":" $url.host | rest | first) | default (ternary "443" "80" (eq $url.scheme "https")) }}}]
{{- end }}
{{- end }}

{{- define "saferlhf.toDns" -}}
- to:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}
    - ipBlock: {cidr: 169.254.20.10/32}
  ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- end }}

{{- define "saferlhf.stepPeers" -}}
- podSelector: {matchLabels: {pipelines.kubeflow.org/v2_component: "true"}}
- podSelector: {matchExpressions: [{key: jobset.sigs.k8s.io/jobset-name, operator: Exists}]}
{{- end }}

{{- define "saferlhf.fromPrometheus" -}}
- from: {{- toYaml .Values.metrics.from | nindent 4 }}
  ports: [{port: {{ .Values.metrics.port }}}]
{{- end }}
