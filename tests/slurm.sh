#!/usr/bin/env bash
# A Slurm on this machine for tests, with a munge of its own: one controller, two nodes (one1 and one2), no accounting.
# Debian's packages slurm-wlm and munge, as root. All that it writes lies in DIR.
#
#     tests/slurm.sh start DIR     afterwards: export SLURM_CONF=DIR/slurm.conf
#     tests/slurm.sh stop DIR      ends its processes, and those of its jobs
set -euo pipefail
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf

start() {
  mkdir -p "$dir"
  host=$(hostname -s)
  read -r controller one two < <(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')
  (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
  touch "$dir/plugstack.conf"
  # A node that does not answer is down after some seconds.
  cat >"$SLURM_CONF" <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
PlugStackConfig=$dir/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmdTimeout=4
KillWait=20
MessageTimeout=5
MailProg=/bin/true
NodeName=one1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$one CPUs=6 Weight=2
NodeName=one2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$two CPUs=3
PartitionName=all Nodes=ALL Default=YES
END
  munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
  slurmctld
  slurmd -N one1
  slurmd -N one2
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --Node --format=%t | grep -c idle)" = 2 ] && exit
    sleep 0.5
  done
  echo "no two idle nodes after 30 seconds; see the logs in $dir" >&2
  exit 1
}

stop() {
  # Daemons and jobs alike have this configuration in their environment; so may what called this script.
  above=" "
  for ((pid = $$; pid > 1; pid = $(awk '/^PPid:/ {print $2}' "/proc/$pid/status"))); do above+="$pid "; done
  for _ in $(seq 50); do
    left=0
    for file in $(grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null); do
      pid=$(basename "$(dirname "$file")")
      if [[ $above != *" $pid "* ]] && kill -KILL "$pid" 2>/dev/null; then left=1; fi
    done
    [ $left = 0 ] && exit
    sleep 0.1
  done
  echo "processes of $dir do not end" >&2
  exit 1
}

"$1"
