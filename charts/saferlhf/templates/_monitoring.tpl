{{/* Where Prometheus finds the metrics of a pod that declares no port. Argument: (list root container). */}}
{{- define "saferlhf.metricsEndpoint" -}}
{{- $metrics := (index . 0).Values.metrics -}}
- path: /metrics
  interval: {{ $metrics.podMonitor.interval }}
  relabelings:
    - {action: keep, sourceLabels: [__meta_kubernetes_pod_container_name], regex: {{ index . 1 }}}
    - {action: keep, sourceLabels: [__meta_kubernetes_pod_phase], regex: Running}
    - action: replace
      sourceLabels: [__meta_kubernetes_pod_ip]
      regex: '([0-9.]+)'
      replacement: '$1:{{ $metrics.port }}'
      targetLabel: __address__
    - action: replace
      sourceLabels: [__meta_kubernetes_pod_ip]
      regex: '(.*:.*)'
      replacement: '[$1]:{{ $metrics.port }}'
      targetLabel: __address__
{{- end }}

{{/* An alert's summary: what, and where. Argument: what. Prometheus fills the braces in. */}}
{{- define "saferlhf.place" -}}
{{ printf "Run {{ $labels.run }}, round {{ $labels.round }}, {{ $labels.stage }}: %s" . | toJson }}
{{- end }}
