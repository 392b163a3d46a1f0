#!/bin/bash
# A real Slurm cluster on one machine, for tests: munged + slurmctld + N slurmd, all state in one folder.
# Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge, which it installs.
# usage: slurm_up.sh [STATE_DIR]      then:  . STATE_DIR/env.sh ; sbatch ...
#   SLURM_T_NODES=2     number of nodes         SLURM_T_GPUS=2   fake GPUs per node (0: none)
#   SLURM_T_CPUS=4      CPUs claimed per node   SLURM_T_MEM=2048 MB claimed per node
#   SLURM_T_NET=loopback|netns   loopback: every node is 127.x of this host; netns: each node has its own
#                        network + UTS namespace (own hostname, own address, nodes reach each other by name)
#   SLURM_T_AUTH=munge|none      SLURM_T_DBD=0|1  (1: MariaDB + slurmdbd, so that sacct works)
# Idempotent: a cluster that already answers is left as it is.
set -euo pipefail
S=$(realpath -m "${1:-${SLURM_T_STATE:-/tmp/slurm-test}}")
N=${SLURM_T_NODES:-2}; GPUS=${SLURM_T_GPUS:-2}; CPUS=${SLURM_T_CPUS:-4}; MEM=${SLURM_T_MEM:-2048}
NET=${SLURM_T_NET:-loopback}; AUTH=${SLURM_T_AUTH:-munge}; DBD=${SLURM_T_DBD:-0}
SN=${SLURM_T_SUBNET:-77}            # a second cluster beside the first: another SUBNET, PREFIX and PORT
PFX=${SLURM_T_PREFIX:-tn}          # node names: tn1, tn2, ...
BASE=${SLURM_T_PORT:-26817}        # slurmctld BASE, slurmd BASE+10+i, slurmdbd BASE+1
HERE=$(cd "$(dirname "$0")" && pwd)

# shellcheck source=/dev/null
if [ -f "$S/env.sh" ] && ( . "$S/env.sh"; timeout 5 sinfo -h -N -t idle,alloc,mix -o %N 2>/dev/null | sort -u | wc -l | grep -qx "$N" ); then
  echo "already up: $S"; exit 0
fi
need=()
for p in slurmctld slurmd slurm-client munge; do dpkg -s $p >/dev/null 2>&1 || need+=("$p"); done
[ "$DBD" = 1 ] && for p in slurmdbd mariadb-server; do dpkg -s $p >/dev/null 2>&1 || need+=("$p"); done
if [ ${#need[@]} -gt 0 ]; then
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=600 "${need[@]}" >/dev/null
fi
"$HERE/slurm_down.sh" "$S" >/dev/null 2>&1 || true
rm -rf "$S"; mkdir -p "$S"/{ctld,spool,log,run,dev,etc}; chmod 755 "$S"
echo "SN=$SN PFX=$PFX NET=$NET" > "$S/run/params"
H=$(hostname -s)

# --- addresses and names
ip_of() { if [ "$NET" = netns ]; then echo "10.213.$SN.$((10+$1))"; else echo "127.0.$SN.$1"; fi; }
if [ "$NET" = netns ]; then CTL_ADDR=10.213.$SN.1; else CTL_ADDR=127.0.0.1; fi
for i in $(seq "$N"); do echo "$(ip_of "$i") $PFX$i # slurm-test:$S" >> /etc/hosts; done    # slurm_down.sh takes them out
if [ "$NET" = netns ]; then
  ip link add "slt-br$SN" type bridge; ip addr add "$CTL_ADDR/24" dev "slt-br$SN"; ip link set "slt-br$SN" up
  for i in $(seq "$N"); do
    ip netns add "slt-$PFX$i"
    ip link add "slt-v$SN-$i" type veth peer name eth0 netns "slt-$PFX$i"
    ip link set "slt-v$SN-$i" master "slt-br$SN" up
    ip -n "slt-$PFX$i" addr add "$(ip_of "$i")/24" dev eth0
    ip -n "slt-$PFX$i" link set eth0 up; ip -n "slt-$PFX$i" link set lo up
  done
fi

# --- auth
AUTHLINES="AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5"
if [ "$AUTH" = munge ]; then
  mkdir -p "$S/munge"; chmod 755 "$S/munge"     # the socket's folder must be searchable by everyone
  ( umask 077; head -c 1024 /dev/urandom > "$S/etc/munge.key" )
  munged --socket="$S/munge/munge.sock" --key-file="$S/etc/munge.key" --pid-file="$S/run/munged.pid" \
         --log-file="$S/log/munged.log" --seed-file="$S/etc/munged.seed" --num-threads=2 --force 2>"$S/log/munged.err"
  AUTHLINES="AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$S/munge/munge.sock,cred_expire=5"
fi

# --- accounting
ACCT="AccountingStorageType=accounting_storage/none"
if [ "$DBD" = 1 ]; then
  mkdir -p "$S/mysql"; chown mysql: "$S/mysql"
  mariadb-install-db --no-defaults --user=mysql --datadir="$S/mysql" --auth-root-authentication-method=normal --skip-test-db >"$S/log/mysql-install.log" 2>&1
  mariadbd --no-defaults --user=mysql --datadir="$S/mysql" --socket="$S/mysql/m.sock" --pid-file="$S/mysql/m.pid" \
     --skip-networking --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 \
     --log-error="$S/log/mysql.log" </dev/null >/dev/null 2>&1 &
  echo $! > "$S/run/mariadbd.pid"
  for _ in $(seq 100); do [ -S "$S/mysql/m.sock" ] && mariadb-admin --no-defaults -uroot -S "$S/mysql/m.sock" ping >/dev/null 2>&1 && break; sleep 0.1; done
  cat > "$S/etc/slurmdbd.conf" <<EOF
$AUTHLINES
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((BASE+1))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
LogFile=$S/log/slurmdbd.log
PidFile=$S/run/slurmdbd.pid
EOF
  sed -i '/^CredType/d' "$S/etc/slurmdbd.conf"; chmod 600 "$S/etc/slurmdbd.conf"
  ACCT="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((BASE+1))
AccountingStoreFlags=job_comment
$([ "$AUTH" = munge ] && echo "AccountingStoragePass=$S/munge/munge.sock")
AccountingStorageTRES=gres/gpu"
fi

# --- slurm.conf, gres.conf, cgroup.conf
GRES=""; : > "$S/etc/gres.conf"
if [ "$GPUS" -gt 0 ]; then
  GRES="Gres=gpu:$GPUS"
  for g in $(seq 0 $((GPUS-1))); do mknod -m 666 "$S/dev/nvidia$g" c 1 3; done   # must be character devices: copies of /dev/null
  if [ "$GPUS" = 1 ]; then F=nvidia0; else F="nvidia[0-$((GPUS-1))]"; fi
  echo "NodeName=${PFX}[1-$N] Name=gpu File=$S/dev/$F AutoDetect=off" > "$S/etc/gres.conf"
fi
echo "CgroupPlugin=cgroup/v1
CgroupAutomount=no" > "$S/etc/cgroup.conf"
cat > "$S/etc/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$H($CTL_ADDR)
SlurmUser=root
SlurmdUser=root
$AUTHLINES
FirstJobId=$((100000 + $(date +%s) % 600000 * 100))
SlurmctldPort=$BASE
SlurmdPort=$((BASE+10))
StateSaveLocation=$S/ctld
SlurmdSpoolDir=$S/spool/%n
SlurmctldPidFile=$S/run/slurmctld.pid
SlurmdPidFile=$S/run/slurmd-%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=30
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0,requeue_setup_env_fail
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdTimeout=300
SlurmctldTimeout=300
InactiveLimit=0
KillWait=5
MinJobAge=3600
Waittime=0
JobRequeue=1
MessageTimeout=30
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc=$S/log/jobcomp.txt
SlurmdParameters=config_overrides
$ACCT
EOF
for i in $(seq "$N"); do
  hn=$PFX$i; port=$((BASE+10)); [ "$NET" = netns ] || port=$((BASE+10+i))
  echo "NodeName=$PFX$i NodeHostname=$hn NodeAddr=$(ip_of "$i") Port=$port CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM $GRES State=UNKNOWN" >> "$S/etc/slurm.conf"
done
echo "PartitionName=test Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 State=UP OverSubscribe=NO" >> "$S/etc/slurm.conf"

# --- daemons (each is its own session, detached; pids in $S/run)
export SLURM_CONF="$S/etc/slurm.conf"
spawn() { # name cmd...
  local n=$1; shift; setsid "$@" </dev/null >"$S/log/$n.out" 2>&1 & echo $! > "$S/run/$n.spawn"; }
port_open() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }
waitport() { for _ in $(seq 200); do port_open "$1" "$2" && return 0; sleep 0.05; done; echo "port $1:$2 never opened" >&2; return 1; }
if [ "$DBD" = 1 ]; then
  export MYSQL_UNIX_PORT="$S/mysql/m.sock"; spawn slurmdbd slurmdbd -D; waitport 127.0.0.1 $((BASE+1))
  sacctmgr -i -Q add cluster test >/dev/null 2>&1 || true
fi
spawn slurmctld slurmctld -D -c
for i in $(seq "$N"); do
  n=$PFX$i; mkdir -p "$S/spool/$n"
  # UTS: the node's hostname is its Slurm name. Mount: a test can hide a folder from one node.
  ns=(); [ "$NET" = netns ] && ns=(ip netns exec "slt-$n")
  # shellcheck disable=SC2016 # expanded there
  spawn "slurmd-$n" "${ns[@]}" unshare --uts --mount sh -c 'hostname "$0"; exec slurmd -D -N "$0"' "$n"
done
cat > "$S/env.sh" <<EOF
export SLURM_CONF=$SLURM_CONF
export SLURM_TEST_STATE=$S
EOF
end=$((SECONDS+30))
while [ $SECONDS -lt $end ]; do
  up=$(timeout 2 sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l || true)
  [ "$up" = "$N" ] && { echo "up: $N nodes, state $S"; exit 0; }
  sleep 0.1
done
echo "cluster did not come up" >&2; sinfo -N -l >&2 || true; tail -n 15 "$S"/log/*.out "$S"/log/*.log >&2; exit 1
