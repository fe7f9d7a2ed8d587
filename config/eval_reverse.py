# The reversal curse, as SMDM measures it: 300 prompts in each direction of each kind of question.
#
#   python eval.py config/eval_reverse.py --init_from=out-sft_reverse
#   python eval.py --input=FOLDER config/eval_reverse.py --init_from=...    the files are elsewhere
#
# The files: github.com/lukasberglund/reversal_curse, data/reverse_experiments. For an ar net:
# --sampler=ar --cfg_scale=0. It can be stopped and started again.
# Published: the 1.1B model breaks the curse that Llama-2 13B and GPT-3 175B have; no numbers.

metric = 'generation'
_folder = input or 'data/reverse'
input = {
    'name to description, same': f'{_folder}/p2d_prompts_test.jsonl',
    'name to description, reversed': f'{_folder}/d2p_reverse_prompts_test.jsonl',
    'description to name, same': f'{_folder}/d2p_prompts_test.jsonl',
    'description to name, reversed': f'{_folder}/p2d_reverse_prompts_test.jsonl',
}
target_template = '{completion}'
match = 'contains'
bleu = True  # SMDM reports it for descriptions; needs nltk: --bleu=False

sampler = 'greedy'
steps = 32
length = 52  # the longest training row
cfg_scale = 0.8
temperature = 0.0
seed = 1234
