# How many GPUs this machine shows to a program that is started from here, as CUDA or ROCm counts them: both end the
# list of visible ones at the first that does not exist. Without a driver nothing is imported to count them.
count_gpus() {
    if [[ $(nvidia-smi --list-gpus 2>/dev/null) == *GPU* || -e /dev/kfd ]]; then # grep -q would break the pipe
        python -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0
    fi
}
