{{- define "relay.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "relay.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "relay.labels" -}}
{{ include "relay.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "relay.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "relay.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* A setting as the environment has it. toJson: Helm's numbers are floats, and 64000000 would become 6.4e+07. */}}
{{- define "relay.written" -}}
{{- if kindIs "string" . -}}
{{- . -}}
{{- else if kindIs "slice" . -}}
{{- join "," . -}}
{{- else -}}
{{- toJson . -}}
{{- end -}}
{{- end -}}

{{/* A setting that is given in `settings`, or what stands for it. Call with (list name otherwise values). */}}
{{- define "relay.setting" -}}
{{- $value := get (index . 2).settings (index . 0) -}}
{{- if or (kindIs "invalid" $value) (and (kindIs "string" $value) (eq $value "")) -}}
{{- index . 1 -}}
{{- else -}}
{{- include "relay.written" $value -}}
{{- end -}}
{{- end -}}

{{- define "relay.stateDir" -}}
{{- include "relay.setting" (list "RELAY_STATE_DIR" "/var/lib/relay" .Values) -}}
{{- end -}}

{{- define "relay.port" -}}
{{- include "relay.setting" (list "PORT" "8080" .Values) -}}
{{- end -}}

{{/* Where files of secrets are mounted. */}}
{{- define "relay.secretDir" -}}/etc/relay/secrets{{- end -}}

{{/* As long as `relayctl stop` waits: DRAIN_SECONDS and 35. */}}
{{- define "relay.gracePeriod" -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds -}}
{{- add (ceil (float64 (include "relay.setting" (list "DRAIN_SECONDS" "25" .Values)))) 35 -}}
{{- else -}}
{{- .Values.terminationGracePeriodSeconds | int64 -}}
{{- end -}}
{{- end -}}

{{/* A setting that is given twice would be given by whichever the API server reads last. */}}
{{- define "relay.onlyOnce" -}}
{{- $values := .Values -}}
{{- range $name := concat (keys $values.secretEnv) (keys $values.secretFiles) -}}
{{- if not (kindIs "invalid" (get $values.settings $name)) -}}
{{- fail (printf "%s is given in settings and as a secret; give it once" $name) -}}
{{- end -}}
{{- if and (hasKey $values.secretEnv $name) (hasKey $values.secretFiles $name) -}}
{{- fail (printf "%s is given in secretEnv and in secretFiles; give it once" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
