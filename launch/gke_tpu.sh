#!/usr/bin/env bash
# One command of agentark as a JobSet on one TPU slice of a GKE cluster: a pod on each host of the slice. When a pod is
# preempted or fails, all are started again, and the run goes on from its newest checkpoint and its trace store.
#
#   launch/gke_tpu.sh --dry-run [CONFIG]                      prints the manifest, applies nothing
#   IMAGE=… CLAIM=… launch/gke_tpu.sh CONFIG [options of agentark …]
#
# IMAGE      of launch/docker/tpu.Dockerfile, in a registry that the cluster may pull from
# CLAIM      PersistentVolumeClaim that all hosts can write to (ReadWriteMany: Filestore), mounted at /runs. On a slice
#            of one host gs://BUCKET/FOLDER will do: the runs are on its own disk and a copy is kept there (`agentark
#            mirror`)
# TOPOLOGY   v5e-8 by default, as `agentark fit --dry-run` calls it; the cluster needs a node pool of that shape
# PART       the command of agentark: run (default), warm-start, debate, select, fit, attribute
# NAME       of the JobSet, agentark by default
# ACCOUNT    Kubernetes service account that may write to the bucket, default by default
# SPOT       yes (default): on nodes that can be preempted; no: on others
# RESTARTS   how often everything may be started again, 100 by default; each preemption takes one
#
# Cost: chips × hours while the node pool has nodes; let it scale to zero. `kubectl delete jobset NAME` stops the run;
# do so as well before the same NAME is used again. Quota: TPU chips of this generation in the region, preemptible ones
# where SPOT=yes; Filestore. Needs kubectl with the cluster's credentials and JobSet (v0.5 or newer) in the cluster.
# Files that the config names (task.path) must be on CLAIM; HF_HOME is there, too. A request that cannot be carried out
# as written (exit code 2) is not tried again. Verified: the manifests against Kubernetes' schemas and one of ours for
# JobSet; none was ever applied.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
require IMAGE CLAIM
require_config configs/qwen3_1.7b.yaml
name="${NAME:-agentark}"
restarts="${RESTARTS:-100}"
require_positive RESTARTS "$restarts"
read_topology "${TOPOLOGY:-v5e-8}"
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "NAME is '$name'; give at most 40 of a-z, 0-9 and -, beginning with a letter."

root=/runs
if [[ "$CLAIM" == gs://* ]]; then
  root=/runs/kept # a folder that is not there yet, so that the copy can be loaded into its place
fi
command=(agentark "${PART:-run}" --config /config/run.yaml --root "$root" "${options[@]}")
volume="persistentVolumeClaim: {claimName: $CLAIM}"
if [[ "$CLAIM" == gs://* ]]; then
  ((hosts == 1)) ||
    fail "$TOPOLOGY has $hosts hosts, which cannot share $CLAIM; give the name of a ReadWriteMany claim."
  command=(agentark mirror keep "$root" "$CLAIM" -- "${command[@]}")
  volume="emptyDir: {}"
fi
words=""
for word in "${command[@]}"; do
  word="${word//\\/\\\\}"
  words+=", \"${word//\"/\\\"}\""
done
spot=""
if [[ "${SPOT:-yes}" == yes ]]; then
  spot='
                cloud.google.com/gke-spot: "true"'
fi

manifest() {
  cat <<YAML
apiVersion: v1
kind: ConfigMap
metadata: {name: $name}
data:
  run.yaml: |
$(sed 's/^/    /' "$config")
---
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # A slice is a node pool: no other job gets a host of it.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  # A headless service, by which pods find each other before they are ready: GKE sets TPU_WORKER_HOSTNAMES from their
  # names, and TPU_WORKER_ID, and those say who leads.
  network: {enableDNSHostnames: true, publishNotReadyAddresses: true}
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - {name: asWrittenImpossible, action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0 # one host alone cannot go on: any failure, a preemption too, and JobSet makes all of them anew
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: run, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              serviceAccountName: ${ACCOUNT:-default}
              terminationGracePeriodSeconds: 120 # in which the run saves
              securityContext: {runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000}
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $arrangement$spot
              tolerations:
                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
              containers:
                - name: run
                  image: $IMAGE
                  command: [${words#, }]
                  env:
                    - {name: HF_HOME, value: /runs/.hub}
                  ports:
                    - {containerPort: 8476} # of the host that leads
                    - {containerPort: 8471} # between the chips of hosts
                  resources:
                    requests: {google.com/tpu: $chips}
                    limits: {google.com/tpu: $chips}
                  volumeMounts:
                    - {name: runs, mountPath: /runs}
                    - {name: config, mountPath: /config}
              volumes:
                - {name: runs, $volume}
                - {name: config, configMap: {name: $name}}
YAML
}

if [[ "$dry_run" == yes ]]; then
  manifest
else
  manifest | kubectl apply -f -
fi
