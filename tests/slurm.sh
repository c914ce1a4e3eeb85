#!/bin/sh
# A SLURM cluster of one node on the loopback interface, in one directory, without cgroups.
#
#   sh tests/slurm.sh DIR         start munged, slurmctld and slurmd; DIR/slurm.conf is for SLURM_CONF
#   sh tests/slurm.sh DIR stop    stop them
#
# Ports are free ones. Nothing outside of DIR is written or read, other daemons of the machine are left alone.
set -eu
PATH=$PATH:/usr/sbin:/sbin
directory=$1
if [ "${2:-}" = stop ]; then
    for name in slurmd slurmctld munged; do
        [ ! -s "$directory/$name.pid" ] || kill "$(cat "$directory/$name.pid")" 2>/dev/null || :
    done
    exit
fi
mkdir -p "$directory/state" "$directory/spool"
chmod 700 "$directory"
free_ports='import socket; s = [socket.socket() for _ in "ab"]; [x.bind(("127.0.0.1", 0)) for x in s]
print(*(x.getsockname()[1] for x in s))'
# shellcheck disable=SC2046 # two words
set -- "$directory" $(python3 -c "$free_ports")
dd if=/dev/urandom of="$directory/munge.key" bs=128 count=1 2>/dev/null
chmod 600 "$directory/munge.key"
cat >"$directory/slurm.conf" <<END
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$2
SlurmdPort=$3
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$directory/munge.socket,cred_expire=5
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MinJobAge=3600
KillWait=30
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:4 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
END
touch "$directory/gpu0" "$directory/gpu1" "$directory/gpu2" "$directory/gpu3" # nobody opens them
echo "NodeName=localhost Name=gpu File=$directory/gpu[0-3]" >"$directory/gres.conf"
munged --force --socket="$directory/munge.socket" --key-file="$directory/munge.key" \
    --pid-file="$directory/munged.pid" --seed-file="$directory/munged.seed" --log-file="$directory/munged.log"
slurmctld -f "$directory/slurm.conf"
slurmd -f "$directory/slurm.conf" -N localhost
