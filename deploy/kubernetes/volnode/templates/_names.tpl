{{/* Labels of everything. */}}
{{- define "volnode.labels" -}}
app.kubernetes.io/name: volnode
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The storage server's management API. */}}
{{- define "volnode.serverUri" -}}
{{- if and .Values.volserver.enabled (eq .Values.server.uri "https://storage-1:10810") -}}
https://{{ .Values.volserver.clusterIP }}:10810
{{- else -}}
{{ .Values.server.uri }}
{{- end -}}
{{- end }}

{{/* Its port. */}}
{{- define "volnode.serverPort" -}}
{{- regexFind ":[0-9]+$" (include "volnode.serverUri" . | trimSuffix "/") | trimPrefix ":" | default "10810" -}}
{{- end }}

{{/* What goes together. */}}
{{- define "volnode.check" -}}
{{- if and (hasPrefix "https:" .Values.server.uri) (not .Values.tls.enabled) -}}
{{- fail "server.uri is https://, and tls.enabled is false: set tls.enabled, or an http:// server" -}}
{{- end -}}
{{- if and (hasPrefix "http:" .Values.server.uri) .Values.tls.enabled -}}
{{- fail "server.uri is http://, and tls.enabled is true: unset tls.enabled, or set an https:// server" -}}
{{- end -}}
{{- if and .Values.volserver.enabled (not .Values.volserver.clusterIP) -}}
{{- fail "volserver.enabled needs volserver.clusterIP, an address that is free in the cluster's range of service addresses" -}}
{{- end -}}
{{- if and .Values.volserver.enabled (not .Values.tls.enabled) -}}
{{- fail "volserver.enabled needs tls.enabled: the server of the chart serves nothing without TLS" -}}
{{- end -}}
{{- if and (eq .Values.dataDaemon.model "pod") .Values.tls.nodeSecret -}}
{{- fail "dataDaemon.model pod needs tls.nodeDirectory in place of tls.nodeSecret: a Secret's files go with the pod, and disks read them after it" -}}
{{- end -}}
{{- if and .Values.snapshots.groups (not .Values.snapshots.enabled) -}}
{{- fail "snapshots.groups needs snapshots.enabled" -}}
{{- end -}}
{{- if gt (len (include "volnode.defaults" . | fromJsonArray)) 1 -}}
{{- fail "more than one of storageClasses says default: true" -}}
{{- end -}}
{{- end }}

{{- define "volnode.defaults" -}}
{{- $names := list -}}
{{- range .Values.storageClasses -}}{{- if .default -}}{{- $names = append $names .name -}}{{- end -}}{{- end -}}
{{- toJson $names -}}
{{- end }}

{{/* What every container but the node's and the server's may: nothing. */}}
{{- define "volnode.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Options by which volcsi finds the server. */}}
{{- define "volnode.serverOptions" -}}
- --server={{ include "volnode.serverUri" . }}
{{- if .Values.tls.enabled }}
- --tls-ca=/tls/ca.crt
- --tls-cert=/tls/tls.crt
- --tls-key=/tls/tls.key
{{- end }}
{{- end }}

{{/* The plugin's own probes. A plugin that does not answer is started anew; one whose daemon or server does not answer is not ready. */}}
{{- define "volnode.probes" -}}
ports:
  - name: healthz
    containerPort: {{ .Values.healthz.port }}
livenessProbe:
  httpGet: {path: /healthz, port: healthz}
  initialDelaySeconds: 10
  periodSeconds: 10
  timeoutSeconds: 6
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: healthz}
  periodSeconds: 10
  timeoutSeconds: 6
{{- end }}
