# SMDM's eight tasks of lm-evaluation-harness, zero-shot, with the released settings of each.
#
#   pip install lm-eval
#   torchrun --nproc_per_node=8 eval.py config/eval_smdm_harness.py \
#       --init_from=nieshen/SMDM:mdm_safetensors/mdm-1028M-3300e18-rsl-0.01-bs-1024.safetensors
#
# Likelihoods are float32 throughout; the release rounds them to bfloat16, where choices can tie.
# For an ar net the exact likelihood: --tasks=arc_easy,boolq,... --cfg_scale=0.
# Published: above TinyLlama 1.1B on four of the eight; no numbers.

metric = 'harness'
tokenizer = 'TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T'
num_fewshot = 0
num_mc = 1024
batch_size = 16
seed = 1234

_chain_rule = dict(method='chain_rule', greedy=False)
_monte_carlo = dict(method='monte_carlo', greedy=False)
tasks = {
    'lambada_standard': dict(method='chain_rule', cfg_scale=1.1, greedy=True),
    'openbookqa': _chain_rule | dict(cfg_scale=1.6),
    'boolq': _chain_rule | dict(cfg_scale=1.6),
    'piqa': _chain_rule | dict(cfg_scale=0.6),
    'arc_easy': _monte_carlo | dict(cfg_scale=0.6),
    'social_iqa': _monte_carlo | dict(cfg_scale=0.6),
    'race': _monte_carlo | dict(cfg_scale=0.7),
    'hellaswag': _monte_carlo | dict(cfg_scale=0.7),
}
