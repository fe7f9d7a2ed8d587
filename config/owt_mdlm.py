# MDLM on OpenWebText (Sahoo et al. 2024, arXiv 2406.07524), 170M parameters.
#
#   python data.py --dataset=openwebtext --tokenizer=gpt2
#   torchrun --nproc_per_node=8 train.py config/owt_mdlm.py
#
# On four nodes, as a job of Slurm (not run here):
#
#   #SBATCH --nodes=4 --gpus-per-node=8 --ntasks-per-node=1 --requeue --signal=TERM@90
#   srun torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --max-restarts=3 \
#       --rdzv_endpoint=$(scontrol show hostnames | head -1):29500 \
#       train.py config/owt_mdlm.py --init_from=auto
#   scontrol requeue $SLURM_JOB_ID
#
# Hardware: 8 GPUs of 80 GB, 32 rows each, two micro-batches a step.
# Published (1M steps, 262B tokens): test perplexity at most 23.2.

out_dir = 'out-owt-mdlm'
dataset = 'openwebtext'  # its last 100,000 documents are validation
tokenizer = 'gpt2'
packing = 'wrap'
block_size = 1024
batch_size = 32
global_batch_size = 512

n_layer = 12
n_head = 12
n_embd = 768
cond_dim = 128  # adaLN-zero
time_conditioning = False  # always fed sigma = 0
dropout = 0.1
objective = 'subs'
time_sampling = 'per_process'  # each micro-batch stratified alone

learning_rate = 3e-4
max_iters = 1_000_000
lr_schedule = 'constant'
warmup_iters = 2500
lr_offset = 0
weight_decay = 0.0
grad_clip = 1.0
ema = 0.9999

eval_interval = 10_000
eval_iters = 0  # all of val_split
ckpt_interval = 2500
keep_interval = 100_000
