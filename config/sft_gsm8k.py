# SMDM on GSM8K: the thought to the question, then the number to both.
#
#   python data.py --dataset=gsm8k --input=train.txt \
#       --tokenizer=TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --name=gsm8k
#   torchrun --nproc_per_node=8 train.py config/sft_gsm8k.py
#
# train.txt: the augmented lines of github.com/da03/implicit_chain_of_thought (data/gsm8k, Git LFS);
# without --input, GSM8K's own 7,473 examples from the hub.
# Hardware: released for 8 GPUs, 16 rows each, two micro-batches a step. One GPU of 80 GB will do,
# by hand: 1,142M parameters x 20 bytes (weights, gradients, two moments, the average's copy) are
# 23 GB, their bfloat16 copies 2 GB, the activations of 16 x 256 tokens about 9 GB.
# --shard=True divides the first by the number of processes.
# Released: 120,193 steps, 40 epochs of 769,240 rows.

out_dir = 'out-sft-gsm8k'
init_from = 'nieshen/SMDM:mdm_safetensors/mdm-1028M-3300e18-rsl-0.01-bs-1024.safetensors'
dataset = 'gsm8k'
val_split = 'train'
packing = 'pair'
pad_to = 'block'
block_size = 256
batch_size = 16
global_batch_size = 256
epochs = 40
dropout = 0.0
objective = 'subs'
schedule_parameters = dict(eps=0.0)  # masked with probability p = (1 - sampling_eps) u +
sampling_eps = 1e-3  # sampling_eps, weight 1/p,
time_sampling = 'iid'  # u uniform in [0, 1) of each row by itself
loss_norm = 'micro'  # micro-batches count alike, whatever they score

learning_rate = 2e-4
lr_schedule = 'cosine'
min_lr = 2e-5
warmup_iters = 1201  # 1% of the released steps
lr_offset = 1 / 2  # set for each of two micro-batches
weight_decay = 0.1
decay_all = True
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
ema = 0.0
seed = 3407

eval_interval = 5000
ckpt_interval = 5000
sample_at_end = False
