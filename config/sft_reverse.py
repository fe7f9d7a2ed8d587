# SMDM on names and descriptions in both orders (Berglund et al. 2023): prompt and completion are
# one text, all of which is masked.
#
#   python data.py --dataset=reverse --input=all_prompts_train.jsonl \
#       --tokenizer=TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --name=reverse
#   torchrun --nproc_per_node=8 train.py config/sft_reverse.py
#
# Hardware: released for 8 GPUs, 4 rows each, two micro-batches a step. One GPU of 80 GB will do, by
# hand: 23 GB as in sft_gsm8k.py, 2 GB of bfloat16 copies, 1 GB of activations. --shard=True divides
# the first by the number of processes.
# Released: 562 steps, 10 epochs of 3,600 rows.

out_dir = 'out-sft-reverse'
init_from = 'nieshen/SMDM:mdm_safetensors/mdm-1028M-1600e18.safetensors'
dataset = 'reverse'
val_split = 'train'
packing = 'pair'
pad_to = 'batch'  # released: to the longest row of each micro-batch, not of the step
block_size = 52  # the longest row
batch_size = 4
global_batch_size = 64
epochs = 10
dropout = 0.0
objective = 'subs'
schedule_parameters = dict(eps=0.0)  # masked with probability p = (1 - sampling_eps) u +
sampling_eps = 1e-3  # sampling_eps, weight 1/p,
time_sampling = 'iid'  # u uniform in [0, 1) of each row by itself
loss_norm = 'micro'  # micro-batches count alike, whatever they score

learning_rate = 2e-4
lr_schedule = 'cosine'
min_lr = 2e-5
warmup_iters = 200
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
