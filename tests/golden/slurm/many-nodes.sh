#!/bin/bash
# One attempt at a training job: one task for each GPU; saved, requeued and continued until done.
# Made by `sft-job submit`. To submit it again by hand: sbatch --chdir=RUN_DIR RUN_DIR/job.sh
#SBATCH --job-name=run
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:h100:8
#SBATCH --cpus-per-task=12
#SBATCH --mem=900G
#SBATCH --time=2880
#SBATCH --partition=gpu
#SBATCH --account="a b"
#SBATCH --qos=long
#SBATCH --constraint="ib&nvme"
#SBATCH --reservation=r1
#SBATCH --comment="say \"hi\" \\o/"
#SBATCH --signal=B:USR1@120
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --mail-user=me@example.org
#SBATCH --nice=100
#SBATCH --spread-job

# Asked to stop while this is being set up: remembered until it can be said to the ranks.
early=
trap 'early=1' USR1 USR2 TERM INT

RUN_DIR=/shared/job/run
PYTHON=/opt/sft/bin/python
CONTAINER=()
SRUN=()
NEEDED=(
    /opt/sft/bin/python
)
NODES=8
TASKS_PER_NODE=8
GPUS_PER_NODE=8
CPUS_PER_TASK=12
GRACE_S=120
REQUEUE=0

# What the shell that has submitted this knew says nothing about this job: places of other processes,
# settings of accelerate, options and filters of Slurm's commands.
for name in $(compgen -e); do
    case $name in
    RANK | WORLD_SIZE | LOCAL_RANK | LOCAL_WORLD_SIZE | LOCAL_SIZE | NODE_RANK | GROUP_RANK | \
        GROUP_WORLD_SIZE | ROLE_RANK | ROLE_WORLD_SIZE | ROLE_NAME | CROSS_RANK | CROSS_SIZE | \
        MASTER_ADDR | MASTER_PORT | TORCHELASTIC_* | PMI_* | PMIX_* | OMPI_COMM_WORLD_* | \
        MV2_COMM_WORLD_* | MPI_LOCAL*RANK* | ACCELERATE_* | FSDP_* | PARALLELISM_CONFIG_* | \
        SFT_JOB_ATTEMPT | SFT_JOB_LAUNCHED | SFT_JOB_BEGAN | SFT_JOB_WORLD_SIZE) unset "$name" ;;
    SQUEUE_* | SINFO_* | SACCT_* | SACCTMGR_* | SCONTROL_* | SCANCEL_* | SPRIO_* | SRUN_* | \
        SLURM_CLUSTERS | SLURM_TIME_FORMAT | SLURM_STEP_* | SLURM_STEPID | SLURM_PTY_* | SLURM_SRUN_* | \
        SLURM_HOSTFILE | SLURM_LABELIO | SLURM_UNBUFFEREDIO | SLURM_STD*MODE | SLURM_REMOTE_CWD | \
        SLURM_WORKING_DIR | SLURM_*PROLOG | SLURM_*EPILOG | SLURM_TEST_EXEC | SLURM_TIMELIMIT | SLURM_WAIT | \
        SLURM_IMMEDIATE | SLURM_EXIT_* | SLURM_KILL_BAD_EXIT | SLURM_NO_KILL | SLURM_OVERLAP | SLURM_EXACT | \
        SLURM_WHOLE | SLURM_DISABLE_STATUS | SLURM_BCAST | SLURM_DEPENDENCY | SLURM_*DEBUG*) unset "$name" ;;
    SBATCH_ACCOUNT | SBATCH_CONSTRAINT | SBATCH_PARTITION | SBATCH_QOS | SBATCH_RESERVATION) ;;
    SBATCH_*) unset "$name" ;; # a successor has the options of this job
    CUDA_VISIBLE_DEVICES | ROCR_VISIBLE_DEVICES | HIP_VISIBLE_DEVICES | GPU_DEVICE_ORDINAL)
        [ "$GPUS_PER_NODE" = 0 ] || unset "$name" ;; # Slurm tells each task
    esac
done

# slurm.setup
module load cuda
export NCCL_IB_HCA=mlx5

# Whatever that has set for its own lines.
set +efuC +o pipefail +o posix
IFS=$' \t\n'

node=${SLURMD_NODENAME:-$(hostname)}
say() { printf '%s  %s\n' "$(date +%FT%T)" "$*"; }
fail() {
    printf 'error: %s\n' "$1"
    exit "${2:-1}"
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a job script: sbatch --chdir=$RUN_DIR $RUN_DIR/job.sh"
cd -- "$RUN_DIR" || fail "node $node: the run directory is not there: $RUN_DIR"

# trouble FOLDER: why nothing can be written there; nothing where it can.
trouble() {
    local said probe=$1/.probe-$SLURM_JOB_ID
    said=$(export LC_ALL=C; { head -c 65536 /dev/urandom > "$probe"; } 2>&1) && said=
    rm -f -- "$probe"
    case $said in
    '') ;;
    *'No space left'*)
        # Without a table of inodes there are 0 of 0.
        if df --output=iavail,itotal -- "$1" | tail -n 1 | grep -qE '^ *0 +[1-9]'; then
            echo "no inodes left on $1"
        else
            echo "no space left on $1"
        fi
        ;;
    *quota*) echo "the disk quota is used up on $1" ;;
    *) echo "cannot be written (${said##*: }): $1" ;;
    esac
}
mkdir -p logs attempts || fail "node $node: $(trouble "$RUN_DIR")"

# --- how far the job is

# Step of the newest complete checkpoint that no attempt has failed to load; 0 without one.
saved_step() {
    local folder step mark newest=0
    for folder in checkpoints/step-*; do
        step=${folder#*/step-}
        [[ $step =~ ^[0-9]{1,18}$ ]] && [ -s "$folder/manifest.json" ] || continue
        step=$((10#$step))
        for mark in attempts/*/unloadable-*; do
            mark=${mark##*-}
            [[ ! $mark =~ ^[0-9]{1,18}$ ]] || [ "$((10#$mark))" -ne "$step" ] || continue 2
        done
        [ "$step" -le "$newest" ] || newest=$step
    done
    echo "$newest"
}

# The numbers of all attempts, oldest first. Those of versions that made no folder have left logs.
attempts() {
    find attempts logs -maxdepth 1 |
        sed -nE 's:^(attempts/|logs/attempt-)0*([0-9]{1,9})$:\2:p' | sort -n -u
}

# Whether the two attempts before have begun where the job stands now, or further.
stuck() {
    local number job step now begun=()
    now=$(saved_step)
    for number in $(attempts); do
        [ "$number" -gt "$attempt" ] || ! read -r job step 2> /dev/null < "attempts/$number/began" ||
            [ "$job" != "$origin" ] || [[ ! $step =~ ^[0-9]+$ ]] || begun+=("$step")
    done
    [ ${#begun[@]} -ge 2 ] && [ "$now" -le "${begun[-1]}" ] && [ "$now" -le "${begun[-2]}" ]
}
give_up_stuck() {
    give_up "two attempts in a row have saved nothing new (step $(saved_step)); not tried again: look into \
$RUN_DIR/logs, mend it, submit again"
}

[ ! -e DONE ] || { say "this job is done; its model is in $RUN_DIR/model"; exit 0; }
# Whoever submits it, by hand too, wants it tried; Slurm and this script only go on.
origin=$SLURM_JOB_ID
how=${1:-}
[ "$how" != successor ] || origin=${2:-$SLURM_JOB_ID}

# written_down JOB VIA: a submission, as `sft-job submit` has them.
written_down() {
    [ -z "$(tail -c 1 submissions.jsonl 2> /dev/null)" ] || echo >> submissions.jsonl # a half line
    printf '{"time": %s, "job": "%s", "via": "%s", "cluster": "slurm"}\n' "$(date +%s)" "$1" "$2" \
        >> submissions.jsonl
}
if ! grep -qs "\"job\": \"$SLURM_JOB_ID\"" submissions.jsonl; then # submitted by hand
    rm -f CANCELLED
    written_down "$SLURM_JOB_ID" sbatch
fi

# Whoever makes the folder of an attempt has its number; a listing may be older than that.
attempt=$(($(attempts | tail -n 1) + 1))
until mkdir "attempts/$attempt" 2> /dev/null; do
    if [ ! -d "attempts/$attempt" ]; then
        why=$(trouble "$RUN_DIR/attempts")
        fail "node $node: ${why:-$RUN_DIR/attempts/$attempt cannot be made}"
    fi
    attempt=$((attempt + 1))
done
logs=logs/attempt-$attempt
stop=stop-$attempt
interrupted=attempts/$attempt/interrupted
ballast=$logs/.ballast
rm -f "$stop" # of a run whose folders somebody has removed

# This attempt has failed: the cause first, also where `sft-job submit status` finds it. Neither
# depends on the other, nor on what is left of the disk.
give_up() {
    rm -f -- "$ballast"
    printf 'error: %s\n' "${1#0 }"
    { printf 'error: %s\n' "${1#0 }" > "$logs/error"; } 2> /dev/null
    say "more in $RUN_DIR/$logs"
    exit "${2:-1}"
}

# Room that is given back to say the last words in, when the ranks have filled the disk.
if ! { mkdir -p "$logs" &&
    printf '{"host": "%s", "pid": %s, "time": %s, "job": "%s"}\n' "$node" $$ "$(date +%s)" "$SLURM_JOB_ID" \
        > "attempts/$attempt/owner.json" &&
    printf '%s\n' "$SLURM_JOB_ID.$attempt" > "$logs/token" &&
    head -c 65536 /dev/urandom > "$ballast"; }; then
    why=$(trouble "$RUN_DIR")
    give_up "node $node: ${why:-cannot write to $RUN_DIR}"
fi

[ ! -e CANCELLED ] || { rm -f -- "$ballast"; say "cancelled by the user"; exit 75; }
! stuck || give_up_stuck
printf '%s %s\n' "$origin" "$(saved_step)" > "attempts/$attempt/began"
say "attempt $attempt, job $SLURM_JOB_ID, nodes $SLURM_JOB_NODELIST, from step $(saved_step)"

# --- how it goes on

# field NAME: of what Slurm says about this job.
field() { printf '%s\n' "$job" | grep -oE "(^| )$1=[^ ]*" | head -n 1 | cut -d= -f2; }

requeue() {
    local job next refused='' newest
    say "$1; saved up to step $(saved_step)"
    newest=$(attempts | tail -n 1)
    if [ "$newest" -gt "$attempt" ]; then
        fail "attempt $newest runs this job now; this one, attempt $attempt, ends"
    elif [ -e CANCELLED ]; then
        exit 75
    elif stuck; then
        give_up_stuck
    elif [ "$REQUEUE" = 0 ]; then
        say "slurm.requeue is false: submit the job again to go on"
        exit 75
    fi
    # The controller may be away, as while it is restarted.
    for _ in {1..60}; do
        # What Slurm itself has decided meanwhile: a job in the queue again must not be put there
        # twice, and one that somebody has taken out must not come back.
        job=$(timeout 60 scontrol show job -o "$SLURM_JOB_ID")
        if [ -z "$job" ]; then
            refused=
            sleep 10 & wait $!
            continue
        elif [ "$(field Restarts)" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
            say "Slurm has requeued it"
            exit 75
        elif [ "$(field JobState)" = COMPLETING ] && [ "$(field Reason)" != TimeLimit ] &&
            [[ "$(field PreemptTime)" != 2* ]]; then
            say "cancelled in Slurm: submit the job again to go on"
            exit 75
        fi
        if [ "$(field Requeue)" = 1 ] && [ -z "$refused" ]; then
            [ "$how" != submitit ] || exit 76 # submitit puts the job back
            if timeout 60 scontrol requeue "$SLURM_JOB_ID"; then
                say "requeued"
                sleep 300 & wait $! # Slurm ends this script
                exit 75
            fi
            # Or done, and the answer lost: Slurm ends scontrol together with this job.
            refused=1
            continue
        fi
        # Submitted meanwhile, with --after: two jobs would train the same steps.
        next=$(sed -n 's/.*"job": "\([0-9]*\)".*/\1/p' submissions.jsonl | tail -n 1)
        if [ -n "$next" ] && [ "$next" != "$SLURM_JOB_ID" ]; then
            job=$(timeout 60 scontrol show job -o "$next" 2>&1)
            case $(field JobState) in
            PENDING | CONFIGURING | RUNNING | REQUEUE* | SUSPENDED | STOPPED | SPECIAL_EXIT)
                say "this site does not requeue: job $next waits for this one, and goes on"
                exit 75
                ;;
            '') # no answer does not say that it has gone
                if [[ $job != *'Invalid job id'* ]]; then
                    sleep 10 & wait $!
                    continue
                fi
                ;;
            esac
        fi
        # What belongs to this job alone is not the successor's.
        [ -z "$ours" ] || unset APPTAINER_CONFIGDIR
        if next=$(timeout 300 env -u SLURM_RESTART_COUNT sbatch --parsable --chdir="$RUN_DIR" \
            --dependency="afterany:$SLURM_JOB_ID" job.sh successor "$origin"); then
            written_down "${next%%;*}" sbatch
            say "this site does not requeue: a successor is in the queue"
            exit 75
        fi
        sleep 10 & wait $!
    done
    fail "neither requeued nor followed by another job: submit the job again to go on" 75
}

# --- when to stop

ranks=$((NODES * TASKS_PER_NODE))
asked=
told=
# Ranks look for the stop file after each step. They are woken once they all can be: a process
# whose handler does not stand yet would die of the signal.
tell() {
    [ -z "$told" ] && [ "$(find "$logs" -name 'rank-*.ready' | wc -l)" -ge "$ranks" ] || return 0
    scancel --signal=USR1 "$SLURM_JOB_ID" && told=1 # the steps, not this shell
}
ask_to_stop() {
    if [ -z "$asked" ]; then
        asked=1
        say "asked to stop by $1"
        [ -e "$stop" ] || printf '%s\n' "$1" > "$stop"
    fi
    tell
}
trap 'ask_to_stop "the batch system"' USR1 USR2
trap 'ask_to_stop "SIGTERM"' TERM
trap 'ask_to_stop "SIGINT"' INT
[ -z "$early" ] || ask_to_stop "the batch system"

# Seconds before the end that saving needs.
reserve() {
    local saved=0
    [ ! -r save_seconds ] || read -r saved < save_seconds
    [[ $saved =~ ^[0-9]{1,6}$ ]] || saved=0 # half written, or of something else
    saved=$((10#$saved))
    echo $((2 * saved > GRACE_S ? 2 * saved : GRACE_S))
}

# Seconds since the epoch at which Slurm ends the job; nothing where it does not say.
end_of_job() {
    local end
    end=$(SLURM_TIME_FORMAT=standard timeout 20 squeue --all --noheader --jobs="$SLURM_JOB_ID" --format=%e 2> /dev/null)
    case $end in 2*T*) date -d "$end" +%s ;; esac
}

# --- every node first: what a rank would fail of without saying where

export SLURM_EXPORT_ENV=ALL # also where sbatch was told to pass nothing on
export SFT_JOB_ATTEMPT=$attempt SFT_JOB_WORLD_SIZE=$ranks
# shellcheck disable=SC2016 # expanded on each node
check='
    trap "" USR1 USR2 TERM
    node=${SLURMD_NODENAME:-$(hostname)}
    [ "$(cat "$1/$2/token" 2>/dev/null)" = "$3" ] ||
        { echo "0 node $node: the run directory is not on this node: $1"; exit 1; }
    shift 3
    for path; do
        [ -r "$path" ] || { echo "0 node $node: not there or not readable: $path"; exit 1; }
    done
    echo "1 $node"'
timeout 120 srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --gpu-bind=none \
    bash -c "$check" check "$RUN_DIR" "$logs" "$SLURM_JOB_ID.$attempt" "${NEEDED[@]}" \
    > "$logs/check.log" 2>&1
case $? in
0) ;;
124) # as a node with a file server that hangs
    silent=$(scontrol show hostnames "$SLURM_JOB_NODELIST" |
        grep -vxFf <(sed -n 's/^1 //p' "$logs/check.log") | paste -sd' ')
    give_up "no answer within 120 s from node(s) $silent"
    ;;
*)
    why=$(grep -v '^1 ' "$logs/check.log" | sed 's/^srun: error: //' | sort | head -n 1)
    [ -n "$why" ] || why=$(trouble "$RUN_DIR/$logs")
    give_up "${why:-srun could not ask the nodes, and said nothing}"
    ;;
esac

# --- the ranks

# A port below those that the kernel gives away.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12768))
# Of the node that has fewest: 64(x2),48
fewest=$(printf '%s\n' "${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE}" | tr , '\n' | sed 's/(.*//' | sort -n | head -n 1)
cpus=${CPUS_PER_TASK:-$((fewest / TASKS_PER_NODE))}
[ "$cpus" -ge 1 ] || cpus=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
# As `sft-job train` does: glibc else gives large blocks back and faults them in anew.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-2147483648}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

ours=
if [ "${CONTAINER[0]:-}" = apptainer ]; then
    command -v apptainer > /dev/null || give_up "node $node: apptainer is not installed"
    # Tasks of a node in one set of namespaces, for GPU peer access; Apptainer 1.3 and newer. What
    # it writes for that goes into the home folder by default, which may not be there.
    [ -n "${APPTAINER_CONFIGDIR:-}" ] || ours=/tmp/sft_job-job-$SLURM_JOB_ID
    export APPTAINER_CONFIGDIR=${APPTAINER_CONFIGDIR:-$ours}
    ! apptainer exec --help 2> /dev/null | grep -q -e --sharens ||
        CONTAINER=(apptainer exec --sharens "${CONTAINER[@]:2}")
fi

# A signal that comes before a rank can handle it would end it. Ignored inside the container: what is
# ignored outside does not stay so. Python takes over when it can. Our images say what else they need
# of the environment; Pyxis, and Apptainer without our definition file, do not read that.
# shellcheck disable=SC2016 # expanded there
deaf=(sh -c 'trap "" USR1 USR2 TERM
    [ -z "${SFT_JOB_FLAVOUR-}" ] || . /opt/sft_job/environment.sh
    exec "$@"' sh)
# --gpu-bind=none: a rank takes the GPU of its SLURM_LOCALID; isolating each breaks CUDA IPC.
srun --nodes="$NODES" --ntasks="$ranks" --ntasks-per-node="$TASKS_PER_NODE" \
    --cpus-per-task="$cpus" --cpu-bind=cores --gpu-bind=none --kill-on-bad-exit=1 \
    --output="$logs/rank-%t.log" "${SRUN[@]}" \
    "${CONTAINER[@]}" "${deaf[@]}" "$PYTHON" -m sft_job.train "$RUN_DIR/job.json" 2> "$logs/srun.log" &
srun_pid=$!
seconds=0
end=
while kill -0 "$srun_pid" 2> /dev/null; do
    if [ $((seconds % 60)) -eq 0 ]; then # it may be changed while the job runs
        now=$(end_of_job)
        end=${now:-$end}
    fi
    if [ -n "$end" ] && [ "$(date +%s)" -ge $((end - $(reserve))) ]; then
        ask_to_stop "the time limit"
    elif [ -n "$asked" ] || [ -e "$stop" ]; then
        tell
    fi
    sleep 1 & wait $!
    seconds=$((seconds + 1))
done
wait "$srun_pid"
code=$?
full=$(trouble "$RUN_DIR")
[ -n "$full" ] || full=$(trouble "$RUN_DIR/$logs")
rm -f -- "$ballast"
# Not before a requeue: there may be no time left, and the next attempt uses it again.
[ -z "$ours" ] || [ -e "$interrupted" ] || timeout 20 srun --nodes="$NODES" --ntasks="$NODES" \
    --ntasks-per-node=1 --gpu-bind=none rm -rf -- "$ours" 2> /dev/null

# --- how it ended

[ ! -e DONE ] || { say "done: $RUN_DIR/model"; exit 0; }
[ ! -e "$interrupted" ] || requeue "$(sed 's/^{"message": "\(.*\)"}$/\1/' "$interrupted")"
for mark in "attempts/$attempt"/unloadable-*; do
    [ ! -e "$mark" ] || requeue "the checkpoint of step $((10#${mark##*-})) could not be loaded: \
$(head -n 1 "$mark"); goes on from the one before"
done

# A process that the system ended could not say why, and Slurm may tell of it after others, which
# failed for want of it.
killed() {
    local how='Killed|Segmentation fault|Bus error|Illegal instruction|Out Of Memory'
    sed -nE "s/^srun: error: ([^:]*): tasks? ([^:]*): ($how).*/node \\1, rank \\2: ended by the system: \\3/p" |
        head -n 1
}
lost_peer='Connection (closed|reset) by peer|[Rr]emote process (exited|has terminated)|Broken pipe'
slurm_said=$logs/srun.log
ranks_said=$(cat "$logs/first-error" 2> /dev/null)
first=$(sed '/Terminating/q' "$slurm_said" | killed)
if [ -z "$first" ] && ! printf '%s\n' "$ranks_said" | head -n 1 | grep -qE "$lost_peer"; then
    first=$ranks_said
fi
[ -n "$first" ] || first=$(killed < "$slurm_said")
[ -n "$first" ] || first=$ranks_said
if [ -z "$first" ]; then
    # A rank that fails before it knows its job, as for want of a package, says so in its log.
    first=$(sed -n 's/^srun: error: //p' "$slurm_said" | head -n 1)
    rank=$(printf '%s\n' "$first" | sed -nE 's/.*: tasks? ([0-9]+).*: Exited with exit code.*/\1/p')
    line=$(grep -a '^error: ' "$logs/rank-$rank.log" 2> /dev/null | tail -n 1)
    [ -n "$line" ] || line=$(grep -av '^[[:space:]]*$' "$logs/rank-$rank.log" 2> /dev/null | tail -n 1)
    [ -z "$line" ] || first="$first; the log of rank $rank ends with: ${line#error: }"
fi
[ -n "$first" ] || first="srun ended with exit code $code and no message"
if [ -n "$full" ] && [ -z "$ranks_said" ]; then # for want of it, the ranks could not
    first=$(printf '%s\n%s' "$full" "$first")
elif [ -n "$full" ]; then
    first=$(printf '%s\n%s' "$first" "$full")
fi
give_up "$first" $((code > 0 ? code : 1))
