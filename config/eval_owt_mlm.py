# The table of the xlm experiment: 1,000 samples of 1,024 tokens in 128 to 1,024 steps; generative
# perplexity (gpt2-large), entropy, MAUVE.
#
#   python data.py --dataset=owt-gpt2-1024-split --tokenizer=gpt2-xlm
#   torchrun --nproc_per_node=8 eval.py config/eval_owt_mlm.py
#
# It can be stopped and started again: samples that are on disk are not drawn again.
# For another net: --init_from=out --samples_dir=...
# What is changed on the command line is named beside the table: this file is the released protocol.

metric = 'table'
init_from = 'dhruveshpatel/mlm-owt@step-800000'
samples_dir = 'samples-owt-mlm'
dataset = 'owt-gpt2-1024-split'  # the references of MAUVE, and what is looked for word for word
dtype = 'float32'

num_samples = 1000
batch_size = 32
length = 1024
table_steps = (128, 256, 512, 1024)
sampler = 'fixed'  # uniform positions
sampler_options = dict(confidence_temperature=1.0)  # xlm's default, of use with a --confidence
top_p = 0.95
judge = 'gpt2-large'
judge_dtype = 'bfloat16'  # autocast
protocol = 'xlm'
featurizer = 'gpt2-large'

published = {
    'gen_ppl': {128: 78.34, 256: 63.27, 512: 55.82, 1024: 54.25},
    'entropy': {128: 4.09, 256: 4.48, 512: 4.70, 1024: 4.86},
    'mauve': {128: 0.39, 256: 0.68, 512: 0.76, 1024: 0.86},
}
