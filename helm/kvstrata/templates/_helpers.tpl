{{/* At most 43 characters: a RayJob's name may have 47, and the release's revision follows. */}}
{{- define "kvstrata.fullname" -}}
{{- $base := default .Chart.Name .Values.nameOverride -}}
{{- $long := ternary .Release.Name (printf "%s-%s" .Release.Name $base) (contains $base .Release.Name) -}}
{{- $name := default $long .Values.fullnameOverride | trunc 43 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]" $name) -}}
{{- fail (printf "the name %q must begin with a letter: choose another release name, or set fullnameOverride" $name) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "kvstrata.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "kvstrata.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* Requests equal limits: a worker that is throttled or killed for memory it was promised is worse than one not placed. */}}
{{- define "kvstrata.resources" -}}
{{- range list "requests" "limits" }}
{{ . }}:
  cpu: {{ $.cpu | quote }}
  memory: {{ $.memory | quote }}
  {{- if $.gpus }}
  nvidia.com/gpu: {{ $.gpus | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/*
A pod of the RayCluster. Arguments: root, group (its values), role (head | prefill | decode | store).
No probes here: KubeRay adds Ray's own. One that asked the router would keep the head from becoming ready, and the
job that starts the router waits for the head to be ready.
*/}}
{{- define "kvstrata.pod" -}}
{{- $root := .root -}}
{{- if and $root.Values.store.disks (not $root.Values.store.secret.name) -}}
{{- fail "store.disks needs store.secret.name: without a secret that stays, nothing on the disks is found again" -}}
{{- end -}}
metadata:
  labels:
    {{- include "kvstrata.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
  annotations:
    checksum/config: {{ $root.Values.config | sha256sum }}
spec:
  serviceAccountName: {{ include "kvstrata.fullname" $root }}
  automountServiceAccountToken: false
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  containers:
    - name: {{ .role }}
      image: {{ include "kvstrata.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- if eq .role "head" }}
      ports:
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        - name: client
          containerPort: 10001
        - name: http
          containerPort: {{ $root.Values.router.port }}
      {{- end }}
      {{- $key := and (eq .role "head") $root.Values.router.apiKeySecret.name }}
      {{- $secret := and (eq .role "head") $root.Values.store.secret.name }}
      {{- if or .group.env $key $secret }}
      env:
        {{- if $secret }}
        - name: KVSTRATA_STORE__SECRET
          valueFrom:
            secretKeyRef:
              name: {{ $root.Values.store.secret.name }}
              key: {{ $root.Values.store.secret.key }}
        {{- end }}
        {{- if $key }}
        - name: KVSTRATA_ROUTER__API_KEY
          valueFrom:
            secretKeyRef:
              name: {{ $root.Values.router.apiKeySecret.name }}
              key: {{ $root.Values.router.apiKeySecret.key }}
        {{- end }}
        {{- with .group.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
      resources:
        {{- include "kvstrata.resources" .group | trim | nindent 8 }}
      securityContext:
        {{- toYaml $root.Values.securityContext | nindent 8 }}
      volumeMounts:
        - name: config
          mountPath: /etc/kvstrata
          readOnly: true
        - name: tmp
          mountPath: /tmp
        - name: home
          mountPath: /home/kvstrata
        {{- range $i, $disk := .group.disks }}
        - name: disk-{{ $i }}
          mountPath: {{ $disk.mountPath }}
        {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "kvstrata.fullname" $root }}
    - name: tmp
      emptyDir: {}
    - name: home
      emptyDir: {}
    {{- range $i, $disk := .group.disks }}
    - name: disk-{{ $i }}
      {{- toYaml $disk.source | nindent 6 }}
    {{- end }}
{{- end -}}
