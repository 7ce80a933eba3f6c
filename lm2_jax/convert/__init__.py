"""Conversion: our parameters to and from the official LM2 code's and Hugging Face's, strictly by tables of names.

tensors.py       files of named tensors, read and written one by one
tables.py        which tensor of theirs is which of ours, for every model and both directions
engine.py        the tables applied: everything that does not fit is found before anything is written
directory.py     a converted lm2_jax directory
official.py      the official code's directory
huggingface.py   Hugging Face directories: plain Llama, or our own modelling code
adapter.py       what a run trained, alone: our own directory or PEFT's; peft_config.py PEFT's settings
llama_config.py  settings of a Llama; rotary.py tables of RoPE frequencies in old files
tokenizer_files.py  the tokenizer's files of a Hugging Face directory; sentencepiece_model.py one kind of them
model_card.py    the README.md of a Hugging Face directory
gguf.py          GGUF files of Llamas; gguf_file.py the format, gguf_tokenizer.py the tokenizer in it
"""
