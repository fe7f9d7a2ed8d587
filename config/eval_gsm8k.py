# GSM8K as SMDM measures it: 1,319 questions, decoded twice.
#
#   torchrun --nproc_per_node=8 eval.py config/eval_gsm8k.py --init_from=out-sft_gsm8k
#
# test.jsonl (or --input=FILE): GSM8K's own (github.com/openai/grade-school-math), with "question"
# and "answer".
# The first pass writes the thought, the second, from the whole text encoded again, the answer.
# It can be stopped and started again. For an ar net: --sampler=ar --cfg_scale=0 --passes=1
# --sampler_options=None.
# Published: "competitive with Llama-2 7B"; the number is not in the sources.

metric = 'generation'
input = 'test.jsonl'
prompt_template = 'Question: {question}'
target_template = '{answer}'
answer_pattern = '#### (.*)$'
match = 'number'  # compared as strings after GSM8K's normalization, as released; 'latex': by value

passes = 2
sampler = 'greedy'
sampler_options = dict(across_rows=True)  # the results depend on the batch
steps = 256
length = 256  # prompt included, of each pass
cfg_scale = 0.1
temperature = 0.1
batch_size = 64
seed = 1234
