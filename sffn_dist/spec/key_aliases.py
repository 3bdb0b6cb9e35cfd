"""What Megatron-LM, Hugging Face, nanoGPT, torchtitan and DeepSpeed call our keys: for a message that names
the nearest one. Standard library only.
"""

from __future__ import annotations

# last part of an unknown key -> our key
ALIASES = {
    **dict.fromkeys(("num_layers", "n_layer", "n_layers", "num_hidden_layers"), "model.layers"),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "hidden_dim", "embed_dim"), "model.width"),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), "model.heads"),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_query_groups"), "model.kv_heads"),
    **dict.fromkeys(
        ("seq_length", "seq_len", "block_size", "max_position_embeddings", "context_length", "n_positions"),
        "model.sequence",
    ),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), "model.vocab"),
    **dict.fromkeys(("hidden_act", "activation_function", "act_fn"), "model.activation"),
    **dict.fromkeys(("normalization", "norm_type"), "model.norm"),
    **dict.fromkeys(
        ("norm_eps", "rms_norm_eps", "layer_norm_eps", "layernorm_epsilon"), "model.norm_epsilon"
    ),
    **dict.fromkeys(("rope_theta", "rotary_base"), "model.rope_base"),
    **dict.fromkeys(("init_method_std", "initializer_range"), "model.init_std"),
    **dict.fromkeys(("tie_word_embeddings", "untie_embeddings_and_output_weights"), "model.tie_embeddings"),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size", "hidden_features", "d_ff"), "ffn.width"),
    **dict.fromkeys(("max_steps", "train_iters", "max_iters", "training_steps", "num_steps"), "train.steps"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "epoch"), "train.epochs"),
    **dict.fromkeys(("global_batch", "train_batch_size", "batch_size", "gbs"), "train.global_batch_size"),
    **dict.fromkeys(
        (
            "micro_batch",
            "train_micro_batch_size_per_gpu",
            "per_device_train_batch_size",
            "local_batch_size",
            "mbs",
        ),
        "train.micro_batch_size",
    ),
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), "train.learning_rate"),
    **dict.fromkeys(
        ("lr_scheduler", "lr_scheduler_type", "lr_decay_style", "scheduler"), "train.learning_rate_schedule"
    ),
    **dict.fromkeys(("min_lr", "min_lr_ratio", "min_lr_factor"), "train.min_learning_rate_ratio"),
    **dict.fromkeys(
        ("warmup", "warmup_steps", "warmup_iters", "warmup_ratio", "lr_warmup_fraction"), "train.warmup_share"
    ),
    **dict.fromkeys(("wd",), "train.weight_decay"),
    **dict.fromkeys(("adam_beta1",), "train.beta1"),
    **dict.fromkeys(("adam_beta2",), "train.beta2"),
    **dict.fromkeys(("adam_eps", "adam_epsilon", "eps"), "train.epsilon"),
    **dict.fromkeys(
        ("clip_grad", "grad_clip", "max_norm", "max_grad_norm", "gradient_clipping"), "train.clip"
    ),
    **dict.fromkeys(
        (
            "tp",
            "tp_size",
            "tensor_parallel",
            "tensor_model_parallel_size",
            "tensor_parallel_size",
            "tensor_parallel_degree",
        ),
        "parallel.tensor",
    ),
    **dict.fromkeys(("sequence_parallel", "sp"), "parallel.sequence"),
    **dict.fromkeys(("zero_stage", "zero_optimization"), "zero.stage"),
    **dict.fromkeys(("bf16", "fp16", "dtype", "mixed_precision", "torch_dtype"), "precision"),
    **dict.fromkeys(
        ("recompute_granularity", "gradient_checkpointing", "activation_checkpoint"), "recompute"
    ),
    **dict.fromkeys(("save_interval", "save_steps", "checkpoint_interval"), "checkpoint.interval"),
    **dict.fromkeys(("save_total_limit", "keep_latest_k"), "checkpoint.keep"),
    **dict.fromkeys(("eval_interval", "eval_steps", "eval_iters"), "evaluation.interval"),
    **dict.fromkeys(("dataset", "dataset_path", "data_path", "train_files"), "data.source"),
    **dict.fromkeys(("tokenizer_path", "tokenizer_model", "vocab_file"), "data.tokenizer"),
    **dict.fromkeys(("out_dir", "output_dir", "save", "dump_folder"), "run.dir"),
    **dict.fromkeys(("load", "resume_from_checkpoint", "init_from_checkpoint"), "init_from.path"),
}
