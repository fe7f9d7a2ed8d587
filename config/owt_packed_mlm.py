# xlm's owt_packed_mlm: owt_mlm on rows of several documents, with attention within each.
#
#   python data.py --dataset=openwebtext --tokenizer=gpt2-xlm
#   torchrun --nproc_per_node=8 train.py config/owt_packed_mlm.py
#
# Hardware: 8 GPUs of 80 GB, 32 rows each, two micro-batches a step.
# Published: no figures. Where our rows differ from the released ones: tests/BENCHMARKS.md.

out_dir = 'out-owt_packed_mlm'
dataset = 'openwebtext'
tokenizer = 'gpt2-xlm'
packing = 'documents'  # whole documents, each closed by EOS; positions from 0 in each
block_size = 1024
batch_size = 32
global_batch_size = 512

n_layer = 12
n_head = 12
n_embd = 768
cond_dim = 0  # no conditioning
mlp = 'relu'
norm_bias = True
head_bias = False
dropout = 0.1
attn_dropout = 0.0  # FlexAttention has none
init = 'xlm'
objective = 'mlm'
schedule_parameters = dict(eps=0.0)  # masked with probability t,
sampling_eps = 0.0  # t uniform in [0, 1),
time_sampling = 'iid'  # of each row by itself
loss_norm = 'micro'  # a mean over the masked positions of each micro-batch

learning_rate = 1e-4
max_iters = 1_000_000
lr_schedule = 'constant'
warmup_iters = 2000
lr_offset = 0
weight_decay = 0.01  # on matrices
grad_clip = 1.0
ema = 0.9999

dtype = 'bfloat16'
eval_interval = 50_000
ckpt_interval = 2500
keep_interval = 100_000
