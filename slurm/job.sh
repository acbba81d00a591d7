# What the batch scripts of this folder share: one attempt at a run, and what comes after it.
#
# Contract: `train_ranks LAUNCHER ARGUMENT...` starts the ranks of `train ARGUMENT...` in this job's allocation and ends
# the script. A run that saved itself (preemption, the end of the time, a signal) is requeued and resumes. One that
# failed is started again at once, on the same nodes, where it has left a new checkpoint and all nodes answer, and else
# requeued; both together `max_restarts` times. What the ranks print goes to the job's log and, by rank, to
# RUN.DIR/logs/JOB-ATTEMPT/rank-N.log; why a run was started again stands in its log and in RUN.DIR/requeues.log.
#
# It is sourced in the folder that holds slurm/, a clone or one of `dist-cifar init`, after `max_requeues` and
# `max_restarts`, and perhaps `container` and `srun_options`.

# A job that was submitted from inside another one has inherited how that one's steps were pinned: srun would obey it.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}"

attempt=${SLURM_RESTART_COUNT:-0}
start=0 # how often the ranks were started again in this attempt
first_signal=
launcher= # process id of the srun that runs the ranks

log() { echo "dist_cifar: job $SLURM_JOB_ID, attempt $attempt: $*"; }

die() { # die CODE MESSAGE: without a requeue
    log "$2"
    exit "$1"
}

# The ranks have their own SIGTERM from SLURM, and a second signal would end a torchrun before they have saved. USR1
# comes to this script alone (--signal=B:USR1@...), and a srun passes it on; on TERM it would kill the ranks at once.
on_usr1() {
    first_signal=${first_signal:-USR1}
    [[ -z $launcher ]] || kill -USR1 "$launcher" 2>/dev/null
}
# At the end of the time SLURM kills this script together with the ranks, which may not have saved by then.
on_term() {
    first_signal=${first_signal:-TERM}
    if time_is_over && ((attempt < max_requeues)); then
        note stopped "the time is over" # before it is true: SLURM kills this script as soon as it is
        log "the time is over; requeued"
        scontrol requeue "$SLURM_JOB_ID" || log "it could not be requeued: submit it again with the same arguments"
    fi
}
trap on_usr1 USR1
trap on_term TERM

job() { scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null | grep -oP "(?<= $1=)\S+"; } # job FIELD

# Python's `dist-cifar status RUN FIELD` would need the container, and seconds of a time that may be over: on this host
# there may be no python. So the file is read as RunDir writes it: a field a line, a string as JSON escapes it.
status() { # status FIELD: of the run's status.json
    sed -nE "s/^ *\"$1\": \"(.*)\",?$/\1/p; t; s/^ *\"$1\": ([^,]*),?$/\1/p" "$run_dir/status.json" 2>/dev/null
}

# A rank writes its output to a file of its own too, where the run directory can be written.
as_rank='
log=$0/rank-${RANK:-$SLURM_PROCID}.log
if mkdir -p "$0" 2>/dev/null && : 2>/dev/null >>"$log"; then
    exec "$@" > >(trap "" TERM USR1 INT; exec tee -a "$log") 2>&1
fi
exec "$@"'

run_once() { # run_once LAUNCHER ARGUMENT...: sets `code`
    local name=$SLURM_JOB_ID-$attempt
    ((start == 0)) || name+=.$start
    local ranks=(bash -c "$as_rank" "$run_dir/logs/$name" python -u -m dist_cifar.train "${@:2}")
    # The number of tasks that sbatch has set is wrong in a job that has been given other nodes. A rank that ends
    # early, as all do when they have saved, must not end the others.
    local tasks=${SLURM_NTASKS_PER_NODE:-1}
    local step=(srun --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" --ntasks-per-node="$tasks" --kill-on-bad-exit=0
        --wait=120 "${srun_options[@]}" "${container[@]}")
    case $1 in
    srun) ;;
    torchrun)
        local head port
        head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        port=$((10000 + SLURM_JOB_ID % 20000))
        while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done # taken by another program
        step+=(torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks_per_node" --max-restarts 0
            --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$name"
            --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --no-python)
        ;;
    esac
    ! was_stopped || { code=75 && return; }
    "${step[@]}" "${ranks[@]}" &
    launcher=$!
    while wait "$launcher"; code=$?; ((code > 128)) && kill -0 "$launcher" 2>/dev/null; do :; done
    launcher=
}

requeue() { # requeue KIND LIMIT REASON: ends the script
    local times
    leave_to_slurm "$3"
    times=$(times_of "$1")
    if ((times >= $2)); then
        die "$code" "$3; not requeued: already started again $times times ($1), and the limit is $2"
    fi
    if ! note "$1" "$3"; then
        die "$code" "$3; not requeued: $run_dir/requeues.log cannot be written, so they could not be counted"
    fi
    requeue_now "$3"
}

times_of() { # times_of KIND: how often the job was requeued, or started again, for that
    local kinds=$1
    [[ $1 != crashed ]] || kinds="(crashed|restarted)"
    grep -csE "^$SLURM_JOB_ID $kinds " "$run_dir/requeues.log" || :
}

newest_checkpoint() { ls "$run_dir/checkpoints" 2>/dev/null | sed -n 's/^step-//p' | sort -n | tail -n 1; }

start_again() { # start_again REASON: prepares it after a crash; fails where the job has to be requeued
    local times
    [[ $(newest_checkpoint) != "$reached" && $(job JobState) == RUNNING ]] || return
    times=$(times_of crashed)
    ((times < max_restarts)) || return
    timeout 10 srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${srun_options[@]}" true 2>/dev/null || return
    note restarted "$1" || return
    log "$1; started again on the same nodes"
    start=$((start + 1))
}

note() { # note KIND REASON: in the log of the requeues
    mkdir -p "$run_dir" 2>/dev/null && # the ranks may not have made it
        { echo "$SLURM_JOB_ID $1 $(date +%FT%T) attempt $attempt: $2" >>"$run_dir/requeues.log"; } 2>/dev/null
}

leave_to_slurm() { # leave_to_slurm REASON: if SLURM is ending the job, and so knows whether it comes back
    local state
    state=$(job JobState)
    [[ $state == RUNNING ]] || die "$code" "$1; its state is ${state:-unknown}: left to SLURM"
}

requeue_now() { # requeue_now REASON: ends the script
    log "$1; requeued"
    for _ in 1 2 3 4 5; do
        scontrol requeue "$SLURM_JOB_ID" && exit "$code"
        sleep 2
    done
    die "$code" "it could not be requeued: submit it again with the same arguments"
}

was_stopped() { [[ -n $first_signal || $(job PreemptTime) == 20* ]]; } # by a signal or a job of a higher priority

time_is_over() { [[ $SLURM_JOB_END_TIME =~ ^[0-9]+$ ]] && (($(date +%s) + 2 >= SLURM_JOB_END_TIME)); }

train_ranks() { # train_ranks srun|torchrun ARGUMENT...: ends the script
    # SLURM 22.05 sets neither of the two: the end of the time, and the cores of a task in srun.
    [[ -n ${SLURM_JOB_END_TIME:-} ]] || SLURM_JOB_END_TIME=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null)
    export SLURM_JOB_END_TIME SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    # Else torchrun sets the first one and warns about it; each rank sets its own number of threads.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
    run_dir=$(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${srun_options[@]}" "${container[@]}" \
        python -m dist_cifar train --print-run-dir "${@:2}")
    code=$?
    ((code != 2)) || die 2 "the arguments are refused; not requeued"
    if ((code)) && was_stopped && ((attempt < max_requeues)); then
        leave_to_slurm "stopped before it began"
        requeue_now "stopped before it began"
    fi
    ((code == 0)) || die "$code" "python -m dist_cifar does not run on $(hostname); not requeued"
    local before now reached reason
    log "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), run directory $run_dir"
    while :; do
        before=$(cat "$run_dir/status.json" 2>/dev/null) now=none reached=$(newest_checkpoint)
        run_once "$@"
        [[ $(cat "$run_dir/status.json" 2>/dev/null) == "$before" ]] || now=$(status status)
        if ((code == 0)) || [[ $now == done ]]; then
            log "done"
            exit 0
        fi
        case $now in
        saved) requeue saved "$max_requeues" "stopped and saved at step $(status step)" ;;
        failed) reason="rank $(status rank) $(status reason)" ;;
        *) reason="exit code $code; see the last folder of $run_dir/logs" ;;
        esac
        ! was_stopped || requeue stopped "$max_requeues" "stopped (${first_signal:-preempted}) before it could save: $reason"
        start_again "$reason" || requeue crashed "$max_restarts" "$reason"
    done
}
