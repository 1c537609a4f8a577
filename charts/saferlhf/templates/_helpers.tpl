{{/* Labels of an object. Argument: (list root component). */}}
{{- define "saferlhf.labels" -}}
{{ include "saferlhf.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{- define "saferlhf.selector" -}}
app.kubernetes.io/name: saferlhf
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/part-of: saferlhf
{{- end }}

{{/* Labels of a pod. No Istio sidecar: it would keep a Job from ending, and its start-up container breaks `restricted`. */}}
{{- define "saferlhf.podLabels" -}}
{{ include "saferlhf.selector" . }}
sidecar.istio.io/inject: "false"
{{- end }}

{{/* What every pod has: PodSecurity `restricted`, and where it may run. Argument: root. */}}
{{- define "saferlhf.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Of servers, not of hooks: those may run before the class is there. Argument: root. */}}
{{- define "saferlhf.priority" -}}
{{- with .Values.priorityClass.name -}}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "saferlhf.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Addresses and keys, as every step has them. Argument: root. */}}
{{- define "saferlhf.environment" -}}
envFrom:
  - configMapRef: {name: saferlhf-platform}
{{- with include "saferlhf.s3Secret" . }}
  - secretRef: {name: {{ . }}}
{{- end }}
{{- with .Values.mlflow.existingLogin }}
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end }}

{{/* Where KFP is and who we are there. Argument: root. */}}
{{- define "saferlhf.kfpEnvironment" -}}
- {name: HOME, value: /tmp}
- {name: KFP_HOST, value: {{ .Values.kfp.host | quote }}}
{{- if .Values.kfp.multiUser }}
- {name: KFP_NAMESPACE, value: {{ .Release.Namespace | quote }}}
- {name: KFP_TOKEN_FILE, value: /var/run/secrets/kfp/token}
{{- end }}
{{- end }}

{{- define "saferlhf.s3Secret" -}}
{{- if .Values.seaweedfs.enabled -}}
{{- .Values.seaweedfs.existingSecret | default "saferlhf-s3" -}}
{{- else -}}
{{- .Values.s3.existingSecret -}}
{{- end -}}
{{- end }}

{{/* The Secret that the ConfigMap kfp-launcher names, ours or Kubeflow's; empty: none. Argument: root. */}}
{{- define "saferlhf.launcherSecret" -}}
{{- if .Values.kfp.launcher.create -}}
{{- include "saferlhf.s3Secret" . -}}
{{- else -}}
{{- .Values.kfp.launcher.existingSecret -}}
{{- end -}}
{{- end }}

{{- define "saferlhf.s3Endpoint" -}}
{{- if .Values.seaweedfs.enabled -}}
http://saferlhf-s3.{{ .Release.Namespace }}.svc.cluster.local:8333
{{- else -}}
{{- .Values.s3.endpoint -}}
{{- end -}}
{{- end }}

{{- define "saferlhf.trackingUri" -}}
{{- if .Values.mlflow.enabled -}}
http://saferlhf-mlflow.{{ .Release.Namespace }}.svc.cluster.local:5000
{{- else -}}
{{- .Values.mlflow.trackingUri -}}
{{- end -}}
{{- end }}

{{/* The SQLAlchemy URI as an environment variable, so that no object holds a password. Argument: root. */}}
{{- define "saferlhf.databaseEnvironment" -}}
- name: MLFLOW_BACKEND_STORE_URI
{{- if .Values.mlflow.database.existingSecret }}
  valueFrom:
    secretKeyRef: {name: {{ .Values.mlflow.database.existingSecret }}, key: {{ .Values.mlflow.database.key }}}
{{- else }}
  value: sqlite:////data/mlflow.db
{{- end }}
{{- end }}

{{/* Brings MLflow's database to the version of the image; makes the tables of an empty one. This is `mlflow db upgrade`,
     which takes the address as an argument only: there its password would stand in the list of processes. */}}
{{- define "saferlhf.migrate" -}}
command: [python3, -c, "import os; from mlflow.db import upgrade; upgrade.main([os.environ['MLFLOW_BACKEND_STORE_URI']])"]
{{- end }}

{{/* What no schema can say: values that do not go together. */}}
{{- define "saferlhf.check" -}}
{{- if and (gt (int .Values.mlflow.replicas) 1) (not .Values.mlflow.database.existingSecret) -}}
{{- fail (printf "mlflow.replicas is %d, but SQLite serves one: set mlflow.database.existingSecret, or mlflow.replicas=1" (int .Values.mlflow.replicas)) -}}
{{- end -}}
{{- if and (not .Values.mlflow.enabled) (not .Values.mlflow.trackingUri) -}}
{{- fail "mlflow.enabled is false and mlflow.trackingUri is empty: runs need an MLflow server, so name one" -}}
{{- end -}}
{{- if and .Values.pipeline.file .Values.pipeline.existingConfigMap -}}
{{- fail "pipeline.file and pipeline.existingConfigMap are both set: choose one" -}}
{{- end -}}
{{- if and .Values.schedule.enabled (not (or .Values.pipeline.file .Values.pipeline.existingConfigMap)) -}}
{{- fail "schedule.enabled is true, but there is no pipeline to schedule: add --set-file pipeline.file=safe_rlhf.yaml" -}}
{{- end -}}
{{- if and .Values.kueue.create (not .Values.kueue.clusterQueue) -}}
{{- fail "kueue.create is true and kueue.clusterQueue is empty: name the ClusterQueue that the platform's owner made" -}}
{{- end -}}
{{- if and .Values.priorityClass.create (not .Values.priorityClass.name) -}}
{{- fail "priorityClass.create is true and priorityClass.name is empty: name the class that is to be made" -}}
{{- end -}}
{{- if and .Values.seaweedfs.enabled (or .Values.s3.endpoint .Values.s3.existingSecret) -}}
{{- fail "seaweedfs.enabled is true, but s3.endpoint or s3.existingSecret names another store: choose one" -}}
{{- end -}}
{{- end }}

{{/* A token that is good for KFP only and for an hour; the kubelet renews it. Argument: root. */}}
{{- define "saferlhf.tokenVolume" -}}
{{- if .Values.kfp.multiUser -}}
- name: kfp-token
  projected:
    sources:
      - serviceAccountToken: {path: token, audience: pipelines.kubeflow.org, expirationSeconds: 3600}
{{- end }}
{{- end }}

{{- define "saferlhf.tokenMount" -}}
{{- if .Values.kfp.multiUser -}}
- {name: kfp-token, mountPath: /var/run/secrets/kfp, readOnly: true}
{{- end }}
{{- end }}
