# The answers of SMDM's chat models to the first turns of MT-bench, in FastChat's form.
#
#   python eval.py config/eval_mt_bench.py --init_from=out-sft_sharegpt --input=question.jsonl
#
# question.jsonl: FastChat's data/mt_bench/question.jsonl. For the ar net: --sampler=ar
# --cfg_scale=0 --answer_file=data/mt_bench/model_answer/1028-ar.jsonl.
# Judged by FastChat, in its fastchat/llm_judge (only the first turn's mean says something):
#
#   python gen_judgment.py --model-list 1028 --judge-model gpt-4o-2024-05-13 --parallel 2
#   python show_result.py --model-list 1028 --judge-model gpt-4o-2024-05-13

metric = 'generation'
input = 'question.jsonl'
prompt_template = 'vicuna'
target_template = ''
answer_file = 'data/mt_bench/model_answer/1028.jsonl'  # the judge knows the model as 1028

sampler = 'ancestral'
steps = 128
length = 1024
cfg_scale = 0.6
temperature = 1.0
batch_size = 1
