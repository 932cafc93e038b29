"""What other programs' names mean here: LLaVA, transformers, peft, DeepSpeed, LLaMA-Factory, axolotl, ms-swift.

Exact synonyms are aliases of the models (`Spec.aliases`) and are renamed. Here stand the names of which only the
meaning is near: an unknown key gets the hint that says where its meaning is set, how it is converted, or that there
is no such thing. The table wins over spelling, since `warmup_steps` is spelt like `max_steps`.
"""

# ruff: noqa: E501 (a table is read by its columns)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from orchestrator import registry
from orchestrator.spec.base import Component, Spec
from orchestrator.spec.components import CompressorSpec, DataSpec, EvaluationSpec
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.phase import PhasesSpec
from orchestrator.spec.yaml.schema import shape_of

_NONE = "no such thing here"

# (hint, names), one line a meaning. `PHASE` stands for `phases.finetune` or `phases.pretrain`.
_TABLE: tuple[tuple[str, str], ...] = (
    # model
    ("model.dtype: bfloat16", "bf16 bf16_full_eval use_bf16 pure_bf16"),
    ("model.dtype: float16", "fp16 fp16_full_eval half use_fp16"),
    ("model.dtype: float32, bfloat16 or float16 (master weights stay float32)",
     "torch_dtype precision mixed_precision compute_dtype amp half_precision_backend fp16_opt_level bfloat16 float16"),
    ("model.attn_implementation: sdpa, eager, flash_attention_2 or flex_attention",
     "flash_attention flash_attn use_flash_attn attn_impl attn_implementation flash_attention_2 flex_attention "
     "sdp_attention sdpa_attention eager_attention xformers_attention use_flash_attention_2 _attn_implementation"),
    ("model.model_name_or_path: a folder or a hub id",
     "model model_id model_name model_path model_dir base_model model_name_or_path base_model_name_or_path hf_model "
     "model_id_or_path model_type base_model_config version_path llm_backbone_id"),
    ("the model's own config and processor decide; model.model_name_or_path names them",
     "tokenizer_name processor_name tokenizer tokenizer_name_or_path tokenizer_config tokenizer_type processor_type "
     "config_name use_fast_tokenizer tokenizer_use_fast special_tokens resize_vocab mm_use_im_start_end "
     "mm_use_im_patch_token model_author model_class trust_remote_code_tokenizer use_unsloth is_llama_derived_model "
     "is_mistral_derived_model split_special_tokens add_special_tokens new_special_tokens padding_side rope_scaling "
     "overrides_of_model_config"),
    ("the model's own config decides which vision layer the projector reads",
     "mm_vision_select_layer mm_vision_select_feature vision_feature_layer vision_feature_select_strategy"),
    ("model.weights: {projector: PATH}, PATH such as LLaVA's mm_projector.bin",
     "pretrain_mm_mlp_adapter pretrain_projector projector_path pretrain_mm_adapter"),
    ("model.weights: {vision_tower: PATH_OR_HUB_ID}; model.model_name_or_path names a whole model, whose config says "
     "which tower it has", "vision_tower mm_vision_tower vision_model vision_encoder image_tower"),
    ("model.weights: {language_model: PATH_OR_HUB_ID}; model.model_name_or_path names a whole model", "llm language_model_path"),
    ("the model's own config says what its projector is; a compressor that learns is a variant under compressors",
     "mm_projector_type mm_resampler_type resampler connector_type projector_type aligner_type"),
    ("model.trust_remote_code: true", "trust_remote_code remote_code"),
    ("model.revision", "hub_revision model_revision revision_of_model model_commit"),
    ("no such thing here: models are trained in 16 or 32 bits, not quantized",
     "bits load_in_8bit load_in_4bit quant_bits quant_type quantization_bit quantization_method quant_method "
     "double_quant quantization_type double_quantization bnb_4bit_compute_dtype bnb_4bit_quant_type "
     "bnb_4bit_use_double_quant bnb_config_kwargs gptq loftq_config upcast_layernorm quantization_config "
     "bnb_4bit_quant_storage use_qalora qalora_group_size fp8 use_hqq"),
    # what trains
    ("PHASE.train: the parts that train; the others are frozen, e.g. train: [projector]",
     "tune_mm_mlp_adapter freeze_backbone freeze_mm_mlp_adapter freeze_vision_tower freeze_vit freeze_llm "
     "freeze_aligner freeze_multi_modal_projector freeze_language_model train_mm_projector_only "
     "trainable_parts freeze_projector unfreeze_mm_vision_tower mm_tunable_parts tune_vision_tower tune_mm_llm "
     "tune_mm_vision tune_mm_mlp freeze_parameters trainable_parameters unfrozen_parameters freeze_vision_modules "
     "tune_type_llm tune_type_vision_tower tune_type_connector tuneable_parts trainable_parameters_regex "
     "freeze_trainable_modules freeze_trainable_layers freeze_parameters_ratio"),
    ("PHASE.train names the parts that train; PHASE.lora: {r: 128, alpha: 256} trains adapters in the language model",
     "finetuning_type train_type sft_type tuner_type adapter tuner_backend training_type lora_enable use_lora "
     "peft_type use_peft lora adapter_type peft_config peft"),
    ("PHASE.lora: {r: ...}", "r lora_r lora_rank"),
    ("PHASE.lora: {alpha: ...}", "lora_alpha"),
    ("PHASE.lora: {dropout: ...}", "lora_dropout lora_dropout_p"),
    ("PHASE.lora: {target_modules: [...]}, matched inside the language model only",
     "target_modules lora_target lora_target_modules lora_target_linear target_regex lora_modules"),
    ("no such thing here: LoRA as PHASE.lora builds it has r, alpha, dropout and target_modules, no bias, no variants",
     "lora_bias lora_weight_path bias use_rslora use_dora lora_plus_lr lorap_lr_ratio loraplus_lr_ratio "
     "loraplus_lr_embedding init_lora_weights fan_in_fan_out modules_to_save additional_target layers_to_transform "
     "layers_pattern rank_pattern alpha_pattern exclude_modules trainable_token_indices layer_replication "
     "eva_config corda_config lora_ga_config velora_config alora_invocation_tokens monteclora_config "
     "target_parameters use_bdlora arrow_config kasa_config ensure_weight_tying megatron_config megatron_core "
     "runtime_config inference_mode auto_mapping peft_version task_type lora_modules_to_save "
     "peft_layers_to_transform lora_fan_in_fan_out create_new_adapter pissa_init use_galore galore_rank use_badam "
     "lora_qkv_enable relora_steps peft_use_dora peft_use_rslora lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
     "adapter_dir use_llama_pro lora_dtype"),
    ("PHASE.start_from: {spec: OTHER.yaml, cell: NAME} or a folder; adapters are stored merged",
     "adapter_name_or_path lora_model_dir adapters adapter_folder load_from_checkpoint"),
    # rates and the optimizer
    ("PHASE.learning_rate: {projector: ..., language_model: ...}, a rate for each part that trains",
     "mm_projector_lr projector_lr aligner_lr merger_lr mm_lr connector_lr learning_rate_projector"),
    ("PHASE.learning_rate: {vision_tower: ..., projector: ..., language_model: ...}, a rate for each part that trains",
     "mm_vision_tower_lr vision_tower_lr vit_lr vision_lr vision_learning_rate learning_rate_vision_tower llm_lr "
     "lr_groups"),
    ("PHASE.warmup_ratio: a share of the phase, warm-up steps / all steps",
     "warmup_steps num_warmup_steps warmup_iters lr_warmup_steps warmup_num_steps warmup_fraction"),
    ("PHASE.lr_scheduler_type: cosine, linear or constant; warmup_ratio says how long it warms up",
     "lr_scheduler_kwargs scheduler lr_schedule lr_decay_style cosine_min_lr_ratio cosine_constant_lr_ratio min_lr "
     "min_lr_ratio lr_scheduler_args lr_decay_steps lr_decay_ratio"),
    ("no such thing here: the optimizer is AdamW with betas 0.9 and 0.999 and eps 1e-8; learning_rate and "
     "weight_decay are set in a phase",
     "optim optim_args optimizer adam_beta1 adam_beta2 adam_epsilon adam_betas betas eps optim_target_modules "
     "optimizer_type optimizer_params adamw_beta1 adamw_beta2 momentum adam_eps adafactor beta1 beta2"),
    ("PHASE.max_grad_norm", "clip_grad grad_clip clip_grad_norm gradient_clip_val grad_norm_clip gradient_clip"),
    ("PHASE.weight_decay", "wd decay weight_decay_rate"),
    # batches
    ("it follows: PHASE.global_batch_size / (per_device_train_batch_size x cluster.num_workers)",
     "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches grad_accum accumulation_steps "
     "gradient_accumulation_steps_per_gpu"),
    ("PHASE.per_device_train_batch_size: auto (the largest that fits)", "auto_find_batch_size autotune_batch_size"),
    ("PHASE.global_batch_size (samples of one optimizer step) and PHASE.per_device_train_batch_size (of one worker)",
     "batch_size train_batch_size micro_batch_size per_gpu_train_batch_size batch_size_per_gpu per_gpu_batch_size"),
    ("evaluations choose their own batches; it changes no score",
     "per_device_eval_batch_size eval_batch_size eval_accumulation_steps eval_do_concat_batches batch_eval_metrics "
     "prediction_loss_only eval_use_gather_object include_for_metrics per_gpu_eval_batch_size"),
    # length of a phase
    ("PHASE.num_train_epochs or PHASE.max_steps", "epochs epoch num_epochs n_epochs total_steps num_steps train_steps "
     "max_train_steps training_steps train_iters max_epochs iterations stage_steps"),
    # data
    ("a named data set under data, e.g. data: {train: {kind: llava_json, data_path: FILE}}, which PHASE.data names",
     "data_path dataset datasets dataset_dir dataset_path train_data train_file data_dir train_dataset dataset_name "
     "dataset_prepared_path mm_data_path data_files train_files data_config dataset_info custom_dataset_info "
     "dataset_config train_data_path pretraining_dataset dataset_type ds_type custom_register_path"),
    ("an evaluation under evaluate: {NAME: {kind: exact_match, data: DATA_SET}}",
     "eval_dataset val_dataset test_datasets eval_data eval_data_path validation_file val_size val_set_size "
     "split_dataset_ratio eval_file do_eval do_predict eval_strategy evaluation_strategy eval_on_start eval_steps "
     "eval_delay evaluation evaluations eval evals benchmarks evals_per_epoch eval_dataset_shuffle eval_sample_packing "
     "eval_table_size eval_max_new_tokens eval_causal_lm_metrics"),
    ("data.NAME.image_folder", "image_folder media_dir image_dir images_dir image_root mm_image_folder"),
    ("data.NAME.image_aspect_ratio", "image_aspect_ratio mm_image_aspect_ratio"),
    ("data.NAME.conversation_template: plain, vicuna_v1 or chat_template",
     "version template conv_template conversation_template chat_template prompt_template conv_version conv_mode "
     "template_type chat_template_path default_system system default_system_message chat_template_jinja"),
    ("data.NAME.max_samples", "max_samples max_train_samples dataset_num_proc_samples train_dataset_sample "
     "max_eval_samples num_rows limit_train_batches"),
    ("PHASE.data: {A: 1.0, B: 0.3}, the share of each set per epoch",
     "interleave_probs dataset_weights data_mix mixing_ratio sampling_ratio mix_strategy interleave_prob "
     "data_weights"),
    ("PHASE.model_max_length, counted in tokens before compression",
     "max_length max_len max_seq_len max_seq_length sequence_len sequence_length seq_len seq_length cutoff_len "
     "max_source_length max_target_length max_model_len truncation_strategy excess_length_strategy min_sample_len "
     "block_size context_length"),
    ("PHASE.group_by_modality_length", "group_by_length train_sampling_strategy length_grouped_sampling "
     "length_column_name"),
    ("no such thing here: samples are padded, never packed",
     "sample_packing packing pack_to_max_length pad_to_sequence_len neat_packing multipack_real_batches "
     "sample_packing_group_size sample_packing_bin_size sample_packing_sequentially eval_packing padding_free "
     "packing_length curriculum_sampling"),
    ("always so: rows are read when they are needed; there is nothing to set",
     "lazy_preprocess streaming lazy_tokenize preprocessing_num_workers dataset_num_proc overwrite_cache "
     "dataset_processes dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
     "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order num_workers_dataloader "
     "num_dataloader_workers dataset_exact_deduplication shuffle_merged_datasets remove_unused_columns "
     "dataloader_drop_last dataset_shuffle train_dataloader_shuffle tokenized_path load_from_cache_file "
     "preprocessing_batch_size buffer_size data_shuffle_buffer"),
    ("always so for conversations: only answers are trained on; image placeholders stand in the rows",
     "is_multimodal train_on_inputs train_on_prompt mask_history loss_scale loss_type train_on_eot "
     "roles_to_train train_on_source mask_prompt"),
    ("the model's own processor decides how images are made and how large they are",
     "image_grid_pinpoints mm_patch_merge_type image_max_pixels image_min_pixels max_pixels min_pixels image_size "
     "image_resolution video_max_pixels video_fps video_maxlen image_processor image_crop_resolution "
     "image_split_resolution image_resize_algorithm video_min_pixels"),
    # memory and parallelism
    ("PHASE.gradient_checkpointing: true", "gradient_checkpointing_kwargs activation_checkpointing_kwargs "
     "vit_gradient_checkpointing disable_gradient_checkpointing recompute use_reentrant_gc"),
    ("PHASE.deepspeed: zero0 to zero3, zero2_offload or zero3_offload, a path, or a mapping",
     "deepspeed zero_stage zero_optimization deepspeed_config ds_config fsdp fsdp_config fsdp_version "
     "parallelism_config tensor_parallel_size pipeline_parallel_size context_parallel_size sharding_strategy "
     "deepspeed_plugin zero_hpz_partition_size ddp fsdp_final_state_dict_type zero3_init_flag zero_force_ds_cpu_optimizer"),
    ("cluster.num_workers: DeepSpeed workers of a lane",
     "num_workers n_gpus num_gpus gpus nproc_per_node num_processes world_size nnodes gpus_per_node devices "
     "num_machines num_nodes n_gpus_per_node ray_num_workers nprocs"),
    ("cluster.use_gpu: auto, true or false", "use_cpu no_cuda device use_gpu use_mps_device use_cuda device_map accelerator"),
    ("cluster: {num_workers, resources_per_worker}; the program starts its own workers",
     "local_rank ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
     "ddp_static_graph accelerator_config master_port master_addr node_rank rank launcher log_on_each_node "
     "ddp_timeout_seconds main_process_port hostfile use_ray ray_run_name ray_scope ray_init_kwargs num_trainers"),
    ("no such thing here: eager torch; what a compressor does changes from stage to stage",
     "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config liger_kernel "
     "enable_liger_kernel tf32 jit_mode_eval use_ipex torch_empty_cache_steps liger_rope liger_rms_norm "
     "liger_glu_activation liger_fused_linear_cross_entropy unsloth_cross_entropy_loss low_cpu_mem_usage"),
    ("no such thing here: the loss is cross entropy over the answers' tokens, a mean over a whole optimizer step",
     "label_smoothing_factor label_names neftune_noise_alpha average_tokens_across_devices label_smoothing "
     "neftune_noise_scale num_items_in_batch aux_loss_coef router_aux_loss_coef moe_aux_loss_coeff loss_function "
     "channel_loss"),
    ("no such thing here: training never generates; an evaluation does what its kind says",
     "use_cache predict_with_generate generation_max_length generation_num_beams generation_config"),
    ("no such thing here: training is supervised, on the answers of conversations",
     "stage pref_beta rlhf_type reward_model rl reward_funcs dpo_beta"),
    # seeds and order
    ("seed, at the top or in PHASE: data order, dropout and random methods follow it",
     "data_seed random_seed manual_seed shuffle_seed"),
    ("cluster.deterministic: true", "full_determinism use_deterministic_algorithms deterministic_algorithms"),
    # where things go, what is kept
    ("cluster.storage_path: one folder for all cells; `llavolta path` finds a cell's weights",
     "output_dir overwrite_output_dir save_dir out_dir logging_dir work_dir results_dir checkpoint_dir save_path "
     "add_version output_path runs_dir log_dir"),
    ("cluster.checkpoint_every: optimizer steps between checkpoints inside a stage run",
     "save_strategy save_steps saves_per_epoch save_every checkpoint_interval save_interval checkpoint_steps "
     "checkpointing_steps"),
    ("cluster.keep: {leaf: full, weights or none}: what stays of a finished cell",
     "save_total_limit save_only_model save_safetensors save_first_step save_final save_last keep_last_n "
     "save_on_each_node save_optimizer enable_jit_checkpoint save_only_last restore_callback_states_from_checkpoint"),
    ("always so: run the same command again and it resumes where it stopped; PHASE.start_from takes other weights",
     "resume_from_checkpoint resume ignore_data_skip resume_only_model auto_resume_from_checkpoints "
     "resume_from resume_path warm_start hub_resume skip_steps"),
    ("no such thing here: a cell is tested at its end, so that no test score picks the weights",
     "load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience early_stopping "
     "early_stop_interval create_checkpoint_symlink compute_loss"),
    ("`llavolta path` finds the weights; the program uploads nothing to a hub",
     "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push push_to_hub_model_id "
     "push_to_hub_organization push_to_hub_token use_hf hub_private hf_use_auth_token export_dir"),
    # tracking and logs
    ("tracking: {tracking_uri, experiment_name}: MLflow, every step",
     "report_to wandb wandb_project wandb_entity wandb_run_id wandb_mode wandb_name wandb_watch wandb_log_model "
     "use_wandb mlflow_tracking_uri mlflow_experiment_name mlflow_run_name use_mlflow use_tensorboard swanlab_project "
     "use_swanlab logger logging loggers log_with trackers tracker swanlab_mode swanlab_workspace comet_project_name "
     "use_comet trackio_space_id trackio_bucket_id trackio_static_space_id use_tensorboard_logging"),
    ("tracking.experiment_name", "project project_name mlflow_experiment experiment experiment_group wandb_group"),
    ("name for the experiment, cell_name for its cells", "run_name exp_name job_name experiment_name wandb_run_name title"),
    ("always so: every optimizer step is logged; there is nothing to set",
     "logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica "
     "include_num_input_tokens_seen disable_tqdm skip_memory_metrics log_every log_interval log_freq plot_loss "
     "print_freq verbose include_tokens_per_second logging_interval log_every_n_steps steps_per_print"),
    ("`llavolta --debug` shows tracebacks; `run --local` is for a debugger", "debug"),
    ("`llavolta run` trains", "do_train train_only mode"),
    # compression
    ("a point's amount is one of stride, keep_tokens (tokens kept an image), keep_ratio (share kept), "
     "layer_average_tokens", "ratio rate retain retention_ratio retention keep num_tokens token_num num_keep "
     "visual_token_num n_tokens num_visual_tokens tokens pool_stride pool_size kernel_size keep_rate retained_tokens "
     "num_retained_tokens budget budgets"),
    ("a share kept is keep_ratio: write 1 - pruning ratio, e.g. prune 0.9 is keep_ratio: 0.1",
     "prune_ratio pruning_ratio reduction_ratio drop_ratio pruning_rate reduction compression_ratio remove_ratio"),
    ("a variant's `layer`: the 0-based decoder layer before which it acts", "layer_list grouping_layer layers k "
     "pruning_layer fast_v_agg_layer agg_layer image_token_ratio_list pruning_loc halfpool insertion_layer at_layer"),
    ("a named variant under compressors, e.g. compressors: {heavy: {kind: average_pool, layer: 2, stride: 8}}",
     "compressor compression pooling operator method variants token_compression"),
    ("a schedule: schedules: {NAME: {kind: stages, stages: [...]}}, which PHASE.schedule names",
     "stages pivots pivot progressive stage_list strides stage_schedule curriculum"),
    # the grid
    ("matrix: {seed: [0, 1]}, and report: {mean_over: [seed]}", "seeds num_seeds"),
    ("matrix: {dotted.path: [values]}", "grid sweep sweeps axes hyperparameters parameters params grid_search axis"),
    ("search: {objectives, space, num_trials}", "optuna tune hpo hyperparameter_search num_trials n_trials"),
    ("extends: FILE.yaml", "defaults base inherit inherits include_file _base_ base_config from parent"),
    ("phases: {finetune: {...}}", "phase training train_args training_args training_arguments trainer sft finetune pretrain "
     "pretraining finetuning"),
)  # fmt: skip


_MEANINGS = {name: hint for hint, names in reversed(_TABLE) for name in names.split()}  # the first hint wins


def _normal(name: str) -> str:
    return name.strip().lstrip("-").lower().replace("-", "_")


def meaning_of(name: str, place: str = "") -> str | None:
    """Return what another program's name means here, as a hint; None where the table does not know it.

    Args:
        name: The name as written.
        place: Dotted path of the block it stands in; what belongs into the same phase is named without its path.
    """
    hint = _MEANINGS.get(_normal(name))
    if hint is None:
        return None
    parts = place.split(".")
    phase = ".".join(parts[:2]) if parts[0] == "phases" and len(parts) > 1 else "phases.finetune"
    hint = hint.replace("PHASE.", "" if phase == place else f"{phase}.").replace("PHASE", phase)
    return (
        hint if hint.startswith((_NONE, "always so", "it follows", "the model", "evaluations", "`")) else f"use {hint}"
    )


def hint_for_key(name: str, known: Sequence[str], place: str = "") -> str | None:
    """Return what an unknown key is likely to be: by meaning, by the block it belongs to, then by spelling in its own block.

    Args:
        name: The key as written.
        known: Keys of the block it stands in.
        place: The block's dotted path.
    """
    if _normal(name) not in known:
        if (meant := meaning_of(name, place)) is not None:
            return meant
        if (elsewhere := _elsewhere(_normal(name), place)) is not None:
            return elsewhere
    return registry.did_you_mean(name, known)


def _elsewhere(name: str, place: str) -> str | None:
    """Return where a key or an alias of it belongs that stands in the wrong block."""
    places = [
        f"{where}.{key}" if where else f"`{key}` at the top of the file"
        for where, key in _places().get(name, {}).items()
        if where != place
    ]
    return f"it belongs elsewhere: {' or '.join(places[:3])}" if places else None


@cache
def _places() -> dict[str, dict[str, str]]:
    """Return the key or alias to the blocks that have it, each with the canonical name there."""
    found: dict[str, dict[str, str]] = {}
    for place, cls in _blocks():
        for key in cls.model_fields.keys() - {"kind"}:
            found.setdefault(key, {})[place] = key
        for alias, key in cls.aliases.items():
            found.setdefault(alias, {})[place] = key
    return found


def _blocks() -> Iterator[tuple[str, type[Spec]]]:
    yield "", ExperimentSpec
    for key, field in ExperimentSpec.model_fields.items():
        if key != "phases" and (cls := _spec_of(field.annotation)) is not None:
            yield key, cls
    phase = _spec_of(PhasesSpec.model_fields["finetune"].annotation)
    assert phase is not None
    yield "phases.finetune", phase
    for key, field in phase.model_fields.items():
        if key != "start_from" and (cls := _spec_of(field.annotation)) is not None:
            yield f"phases.finetune.{key}", cls
    yield "compressors.NAME", CompressorSpec
    yield "data.NAME", DataSpec
    yield "evaluate.NAME", EvaluationSpec


def _spec_of(annotation: Any) -> type[Spec] | None:
    """Return the one model an annotation names, components aside."""
    cls = shape_of(annotation).spec_class()
    return None if cls is None or issubclass(cls, Component) else cls


# What a value of another program is called here, by the key it stands under.
_VALUES: dict[str, dict[str, str]] = {
    "dtype": {
        **dict.fromkeys(("bf16", "torch.bfloat16", "bf16-mixed", "bf16_mixed"), "bfloat16"),
        **dict.fromkeys(("fp16", "half", "torch.float16", "fp16-mixed"), "float16"),
        **dict.fromkeys(("fp32", "float", "full", "torch.float32", "32", "no", "tf32"), "float32"),
    },
    "attn_implementation": {
        **dict.fromkeys(("flash_attn", "flash_attn_2", "flash", "fa2", "flash_attention", "flash-attn"), "flash_attention_2"),
        **dict.fromkeys(("torch", "math", "none", "disabled"), "eager"),
        "flex": "flex_attention",
    },
    "lr_scheduler_type": {
        **dict.fromkeys(("cosine_with_warmup", "cosine_annealing", "cosineannealinglr"), "cosine"),
        **dict.fromkeys(("linear_with_warmup", "warmupdecaylr", "warmup_decay"), "linear"),
        **dict.fromkeys(("constant_with_warmup", "warmuplr", "const"), "constant"),
    },
    "deepspeed": {
        **dict.fromkeys(("0", "stage0", "z0", "none"), "zero0"),
        **dict.fromkeys(("1", "stage1", "z1"), "zero1"),
        **dict.fromkeys(("2", "stage2", "z2"), "zero2"),
        **dict.fromkeys(("3", "stage3", "z3"), "zero3"),
    },
    "train": {
        **dict.fromkeys(("vision", "vit", "vision_encoder", "image_encoder", "mm_vision_tower", "visual", "vision_model"), "vision_tower"),
        **dict.fromkeys(("aligner", "connector", "mm_projector", "merger", "mm_mlp_adapter", "multi_modal_projector", "adapter"), "projector"),
        **dict.fromkeys(("llm", "mm_language_model", "text_model", "backbone", "lm", "language"), "language_model"),
    },
    "conversation_template": {
        **dict.fromkeys(("v1", "vicuna", "llava_v1", "vicuna_v1.1", "vicuna_v1_5"), "vicuna_v1"),
        **dict.fromkeys(("chatml", "qwen", "qwen2_vl", "llama3", "default", "auto", "chat"), "chat_template"),
        **dict.fromkeys(("pretrain", "llava_plain", "v0_plain"), "plain"),
    },
}  # fmt: skip
_VALUES["kind"] = {
    **dict.fromkeys(("avgpool", "avg_pool", "avgpool1d", "averagepool", "mean_pool", "pooling", "llavolta"), "average_pool"),
    **dict.fromkeys(("avgpool2d", "avg_pool_2d"), "average_pool_2d"),
    **dict.fromkeys(("pdrop", "pyramiddrop"), "pyramid_drop"),
    **dict.fromkeys(("llava", "sharegpt", "json", "jsonl", "llava_jsonl"), "llava_json"),
    **dict.fromkeys(("accuracy", "exact", "em"), "exact_match"),
    **dict.fromkeys(("vqa", "vqav2", "vqa_v2", "textvqa", "vizwiz", "vqa_score"), "vqa_accuracy"),
    **dict.fromkeys(("mcq", "multichoice", "choice_accuracy"), "multiple_choice"),
    **dict.fromkeys(("docvqa", "infographicvqa", "levenshtein"), "anls"),
    **dict.fromkeys(("perplexity", "ppl", "cross_entropy", "val_loss", "eval_loss"), "loss"),
    **dict.fromkeys(("llm_judge", "gpt_judge", "gpt4", "llm_as_a_judge"), "judge"),
    **dict.fromkeys(("loguniform", "log"), "log_uniform"),
    **dict.fromkeys(("categorical", "choices"), "choice"),
    "kmeans": "k_means", "qformer": "q_former", "random": "random_drop", "downsampling": "downsample", "multi_stage": "stages",
}  # fmt: skip
_VALUES["weights"] = _VALUES["learning_rate"] = _VALUES["train"]


def hint_for_value(key: str, value: str, known: Sequence[str]) -> str | None:
    """Return what an unknown value under a key is likely to be: what it is called here, else by spelling."""
    meant = _VALUES.get(key, {}).get(value.strip().lower())
    return f"did you mean {meant}?" if meant in known else registry.did_you_mean(value, known)
