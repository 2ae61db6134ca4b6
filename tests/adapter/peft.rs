//! Adapters that PEFT wrote, on small models: outputs, merging, 50 steps of training, and files that equal its own.
//! tests/golden/make_peft.py says where the numbers come from.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_attention::adapter::{Adapt, LoraConfig, PeftExtras, load_peft, save_peft};
use candle_attention::block::{
    Activation, MlpConfig, NormConfig, NormPlacement, TransformerBlock, TransformerBlockConfig,
};
use candle_attention::rotary::RotaryConfig;
use candle_attention::train::{AdamW, AdamWConfig};
use candle_attention::{Error, ForwardOptions, Layout, Result, SelfAttentionConfig, checkpoint};
use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;

use crate::common::{assert_close, numbers};
use crate::layers::assert_error_says;

const KINDS: [&str; 8] =
    ["bert", "bert_regex", "bert_classifier", "gpt2", "llama", "llama_all_linear", "qwen3", "qwen3_one_layer"];

/// A model with its adapter and PEFT's numbers.
struct Model {
    folder: PathBuf,
    layout: Layout,
    config: TransformerBlockConfig,
    /// The paths of the two blocks in the model that PEFT wrapped.
    paths: [String; 2],
    cases: HashMap<String, Tensor>,
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a golden file")).expect("JSON")
}

impl Model {
    fn load(kind: &str) -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/peft").join(kind);
        let json = read_json(&folder.join("config.json"));
        let size = |field: &str| json[field].as_u64().unwrap_or_else(|| panic!("{field} of {kind}")) as usize;
        let norm = |field: &str| json[field].as_f64().unwrap_or_else(|| panic!("{field} of {kind}"));
        let (layout, config) = match kind.split('_').next() {
            Some("bert") => {
                let (attention, mlp) = (SelfAttentionConfig::new(16, 4), MlpConfig::new(16, size("intermediate_size")));
                let config = TransformerBlockConfig::new(attention, mlp, NormConfig::layer(norm("layer_norm_eps")));
                (Layout::Bert, TransformerBlockConfig { placement: NormPlacement::Post, ..config })
            }
            Some("gpt2") => {
                let attention = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(16, 4) };
                let mlp = MlpConfig { activation: Activation::GeluTanh, ..MlpConfig::new(16, size("n_inner")) };
                (
                    Layout::Gpt2,
                    TransformerBlockConfig::new(attention, mlp, NormConfig::layer(norm("layer_norm_epsilon"))),
                )
            }
            _ => {
                let base = json["rope_parameters"]["rope_theta"].as_f64().expect("rope_theta");
                let attention = SelfAttentionConfig {
                    num_kv_heads: Some(2),
                    head_dim: Some(size("head_dim")),
                    is_causal: true,
                    qkv_bias: false,
                    out_bias: false,
                    qk_norm_eps: kind.starts_with("qwen3").then(|| norm("rms_norm_eps")),
                    rotary: Some(RotaryConfig { base, ..RotaryConfig::default() }),
                    ..SelfAttentionConfig::new(16, 4)
                };
                let mlp = MlpConfig::swiglu(16, size("intermediate_size"));
                (Layout::Llama, TransformerBlockConfig::new(attention, mlp, NormConfig::rms(norm("rms_norm_eps"))))
            }
        };
        let bytes = std::fs::read(folder.join("cases.safetensors")).expect("a golden file");
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("safetensors");
        let layers = metadata.metadata().as_ref().expect("metadata")["layers"].clone();
        let cases = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        Ok(Self { folder, layout, config, paths: serde_json::from_str(&layers).expect("two names"), cases })
    }

    fn case(&self, name: &str, dtype: DType) -> Result<Tensor> {
        Ok(self.cases.get(name).unwrap_or_else(|| panic!("no {name}")).to_dtype(dtype)?)
    }

    fn blocks(&self, dtype: DType) -> Result<Vec<TransformerBlock>> {
        let vb = checkpoint::var_builder(self.folder.join("model.safetensors"), dtype, &Device::Cpu)?;
        let block = |path: &String| TransformerBlock::from_layout(self.layout, &self.config, vb.pp(path));
        self.paths.iter().map(block).collect()
    }

    /// The blocks with their paths.
    fn named<'a>(&'a self, blocks: &'a [TransformerBlock]) -> Vec<(&'a str, &'a TransformerBlock)> {
        self.paths.iter().map(String::as_str).zip(blocks).collect()
    }

    fn adapted(&self, dtype: DType) -> Result<(Vec<TransformerBlock>, PeftExtras)> {
        load_peft(self.folder.join("adapter"), "default", self.layout, &self.named(&self.blocks(dtype)?))
    }

    fn check_outputs(&self, blocks: &[TransformerBlock], case: &str, dtype: DType, tolerance: f64) -> Result<()> {
        let mut x = self.case("input", dtype)?;
        for (i, block) in blocks.iter().enumerate() {
            x = block.forward(&x)?;
            let name = format!("{case}.{i}");
            assert_close(&x, &self.case(&name, dtype)?, tolerance, &format!("{} {name}", self.folder.display()));
        }
        Ok(())
    }

    /// Saves the adapter of these blocks, and reads the folder back.
    fn saved(&self, blocks: &[TransformerBlock], extras: &PeftExtras) -> Result<(Value, HashMap<String, Tensor>)> {
        let folder = tempfile::tempdir().expect("a folder");
        // PEFT's own checks of what this crate writes: see tests/golden/check_peft.py.
        let kept = std::env::var("CANDLE_ATTENTION_PEFT_OUT")
            .map(|out| Path::new(&out).join(self.folder.file_name().unwrap()));
        let path = kept.unwrap_or_else(|_| folder.path().join("adapter"));
        save_peft(&path, "default", self.layout, &self.named(blocks), extras)?;
        if std::env::var_os("CANDLE_ATTENTION_PEFT_OUT").is_some() {
            let output = blocks[0].forward(&self.case("input", DType::F32)?)?;
            candle_core::safetensors::save(&HashMap::from([("output", output)]), path.join("outputs.safetensors"))?;
        }
        let tensors = candle_core::safetensors::load(path.join("adapter_model.safetensors"), &Device::Cpu)?;
        Ok((read_json(&path.join("adapter_config.json")), tensors))
    }
}

#[test]
fn adapters_of_peft_give_its_outputs() -> Result<()> {
    for kind in KINDS {
        let model = Model::load(kind)?;
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
            let (blocks, _) = model.adapted(dtype)?;
            model.check_outputs(&blocks, "active", dtype, tolerance)?;
            let disabled = blocks.iter().map(|x| x.with_active_adapter(None)).collect::<Result<Vec<_>>>()?;
            model.check_outputs(&disabled, "disabled", dtype, tolerance)?;
            let merged = blocks.iter().map(|x| x.merge("default")).collect::<Result<Vec<_>>>()?;
            model.check_outputs(&merged, "merged", dtype, tolerance)?;
        }
    }
    Ok(())
}

#[test]
fn fifty_steps_of_training_are_those_of_peft() -> Result<()> {
    for kind in KINDS {
        let model = Model::load(kind)?;
        for (dtype, name, tolerance) in [(DType::F64, "f64", 1e-10), (DType::F32, "f32", 2e-5)] {
            let (blocks, extras) = model.adapted(dtype)?;
            let mut parameters = Vec::new();
            for (path, block) in model.named(&blocks) {
                for (matrix, tensor) in block.adapter_parameters("default")? {
                    parameters.push((format!("{path}.{matrix}"), Var::from_tensor(&tensor)?));
                }
            }
            let mut optimizer =
                AdamW::new(&parameters, AdamWConfig { lr: 1e-2, weight_decay: 0.0, ..Default::default() })?;
            let mut losses = Vec::new();
            for _ in 0..50 {
                let hidden = blocks[0].forward_t(&model.case("input", dtype)?, true)?;
                let output = blocks[1].forward_t(&hidden, true)?;
                let loss = (output - model.case("target", dtype)?)?.sqr()?.mean_all()?;
                losses.push(loss.to_dtype(DType::F64)?.to_scalar::<f64>()?);
                optimizer.step(&loss.backward()?)?;
            }
            let expected = numbers(&model.case(&format!("train.{name}.losses"), DType::F64)?)?;
            for (step, (loss, expected)) in losses.iter().zip(expected).enumerate() {
                let bound = if dtype == DType::F64 { 1e-10 } else { 1e-5 };
                assert!(
                    (loss - expected).abs() < bound,
                    "{kind}, {dtype:?}, step {step}: {loss} instead of {expected}"
                );
            }
            assert!(losses[49] < losses[0], "{kind}: {losses:?}");
            let (_, saved) = model.saved(&blocks, &extras)?;
            let start = format!("train.{name}.end.");
            let ends = model.cases.keys().filter_map(|case| case.strip_prefix(&start));
            let mut count = 0;
            for end in ends {
                assert_close(&saved[end], &model.case(&format!("{start}{end}"), dtype)?, tolerance, end);
                count += 1;
            }
            assert!(count >= 4, "{kind}: {count} matrices");
        }
    }
    Ok(())
}

/// Every field that changes numbers, and every tensor bit for bit. (PEFT writes the ends of the modules' names, this crate the whole
/// names.)
#[test]
fn saved_adapters_are_what_peft_wrote() -> Result<()> {
    for kind in KINDS {
        let model = Model::load(kind)?;
        let (blocks, extras) = model.adapted(DType::F32)?;
        let (config, tensors) = model.saved(&blocks, &extras)?;
        let theirs =
            candle_core::safetensors::load(model.folder.join("adapter/adapter_model.safetensors"), &Device::Cpu)?;
        let names = |tensors: &HashMap<String, Tensor>| {
            let mut names: Vec<_> = tensors.keys().cloned().collect();
            names.sort();
            names
        };
        assert_eq!(names(&tensors), names(&theirs), "{kind}");
        for (name, tensor) in &theirs {
            crate::common::assert_same_bits(&tensors[name], tensor, name);
        }
        let their_config = read_json(&model.folder.join("adapter/adapter_config.json"));
        let by_modules = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"];
        let patterns = ["rank_pattern", "alpha_pattern", "modules_to_save"];
        for (field, value) in their_config.as_object().expect("an object") {
            if !by_modules.contains(&field.as_str()) && !patterns.contains(&field.as_str()) && !value.is_null() {
                assert_eq!(config.get(field), Some(value), "{kind}: {field}");
            }
        }
    }
    Ok(())
}

/// GPT-2's q_proj, k_proj and v_proj are one matrix, for which PEFT has one A.
#[test]
fn projections_of_one_matrix_share_what_their_adapter_reads() -> Result<()> {
    let model = Model::load("gpt2")?;
    let (blocks, extras) = model.adapted(DType::F32)?;
    let names: Vec<_> = blocks[0].adapter_parameters("default")?.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.iter().filter(|name| name.contains("lora_A")).count(), 4, "{names:?}");
    assert_eq!(blocks[0].vars().len(), 4 + 6);

    // Adapters of their own become one of three times the rank, which computes the same.
    let base = model.blocks(DType::F32)?;
    let own = |block: &TransformerBlock| crate::adapted(block, "default", &LoraConfig::new(2, 3.0), 3);
    let own = base.iter().map(own).collect::<Result<Vec<_>>>()?;
    let folder = tempfile::tempdir().expect("a folder");
    save_peft(folder.path(), "default", model.layout, &model.named(&own), &extras)?;
    let (loaded, _) = load_peft(folder.path(), "default", model.layout, &model.named(&base))?;
    let x = model.case("input", DType::F32)?;
    for (own, loaded) in own.iter().zip(&loaded) {
        assert_close(&loaded.forward(&x)?, &own.forward(&x)?, 1e-5, "joined");
    }
    Ok(())
}

/// One A has one input, so all projections of the matrix drop the same numbers, on every path.
#[test]
fn projections_of_one_matrix_drop_the_same_numbers() -> Result<()> {
    let model = Model::load("gpt2")?;
    let folder = changed(&model, |json| json["lora_dropout"] = 0.4.into(), |_| ());
    let base = model.blocks(DType::F64)?;
    let (blocks, _) = load_peft(folder.path(), "default", model.layout, &model.named(&base))?;
    let (block, x) = (&blocks[0], model.case("input", DType::F64)?);
    let run = |return_weights| {
        block.set_dropout_calls([0, 0]);
        let options = ForwardOptions { train: true, return_weights, ..Default::default() };
        Ok::<_, Error>(block.forward_with(&x, &options)?.output)
    };
    assert_close(&run(true)?, &run(false)?, 1e-12, "with weights");
    assert!(crate::common::max_abs_difference(&run(false)?, &block.forward(&x)?)? > 1e-3);
    let parameters = block.adapter_parameters("default")?;
    let vars = parameters.iter().map(|(name, tensor)| Ok((name.as_str(), Var::from_tensor(tensor)?)));
    let vars = vars.collect::<Result<Vec<_>>>()?;
    let vars: Vec<_> = vars.iter().map(|(name, var)| (*name, var)).collect();
    crate::common::check_gradients(&vars, || run(false)?.sqr(), 1e-6, "shared A");
    Ok(())
}

/// A copy of an adapter's folder with a changed config and changed tensors.
fn changed(
    model: &Model,
    config: impl Fn(&mut Value),
    tensors: impl Fn(&mut HashMap<String, Tensor>),
) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let mut json = read_json(&model.folder.join("adapter/adapter_config.json"));
    config(&mut json);
    std::fs::write(folder.path().join("adapter_config.json"), json.to_string()).expect("a file");
    let path = model.folder.join("adapter/adapter_model.safetensors");
    let mut all = candle_core::safetensors::load(path, &Device::Cpu).expect("tensors");
    tensors(&mut all);
    candle_core::safetensors::save(&all, folder.path().join("adapter_model.safetensors")).expect("a file");
    folder
}

#[test]
fn folders_that_do_not_fit_are_one_clear_error() -> Result<()> {
    let model = Model::load("bert")?;
    let blocks = model.blocks(DType::F32)?;
    let load = |folder: &Path| load_peft(folder, "default", model.layout, &model.named(&blocks));
    let with_field =
        |field: &str, value: Value| load(changed(&model, |json| json[field] = value.clone(), |_| ()).path());
    for (field, value) in [
        ("use_dora", Value::Bool(true)),
        ("lora_bias", Value::Bool(true)),
        ("bias", "all".into()),
        ("init_lora_weights", "pissa_niter_4".into()),
        ("init_lora_weights", "OLoRA".into()),
        ("layer_replication", serde_json::json!([[0, 1]])),
        ("trainable_token_indices", serde_json::json!([1])),
        ("a_feature_of_next_year", Value::Bool(true)),
        ("peft_type", "IA3".into()),
    ] {
        assert_error_says(
            with_field(field, value.clone()),
            &["adapter_config.json", field, value.as_str().unwrap_or("")],
        );
    }
    with_field("a_size_of_next_year", 16.into())?;
    with_field("init_lora_weights", "gaussian".into())?;
    assert_error_says(with_field("r", 0.into()), &["rank", "at least 1"]);
    assert_error_says(
        with_field("alpha_pattern", serde_json::json!({"query": 1e300})),
        &["query", "alpha / rank", "F32"],
    );
    assert_error_says(with_field("lora_dropout", 1.5.into()), &["dropout_p", "1.5"]);
    assert_error_says(with_field("target_modules", "(".into()), &["adapter_config.json", "regular expression"]);
    assert_error_says(with_field("target_modules", Value::Null), &["target_modules", "none"]);

    let query = "base_model.model.encoder.layer.1.attention.self.query.lora_A.weight";
    let value = "base_model.model.encoder.layer.0.attention.self.value.lora_B.weight";
    let folder = changed(
        &model,
        |_| (),
        |tensors| {
            tensors.insert(query.into(), Tensor::full(f32::NAN, (4, 16), &Device::Cpu).unwrap());
            tensors.remove(value);
            tensors
                .insert("base_model.model.pooler.dense.lora_A.weight".into(), tensors.values().next().unwrap().clone());
        },
    );
    let says =
        ["adapter_model.safetensors", query, "NaN", value, "is missing", "pooler.dense.lora_A.weight` is unexpected"];
    assert_error_says(load(folder.path()), &says);
    let text = load(folder.path()).map(drop).unwrap_err().to_string();
    assert_eq!(text.matches("unexpected").count(), 1, "only the pooler's is unexpected: {text}");
    let with_head = Model::load("bert_classifier")?;
    let folder = changed(
        &with_head,
        |_| (),
        |tensors| {
            let head = "base_model.model.classifier.weight";
            tensors.insert(head.into(), Tensor::full(f32::NAN, (3, 16), &Device::Cpu).unwrap());
        },
    );
    let blocks_with_head = with_head.blocks(DType::F32)?;
    let loaded = load_peft(folder.path(), "default", with_head.layout, &with_head.named(&blocks_with_head));
    assert_error_says(loaded, &["base_model.model.classifier.weight", "NaN"]);
    // A rank that the matrices don't have, and the adapter of another model.
    assert_error_says(with_field("r", 3.into()), &[query, "[3, 16]", "[4, 16]"]);
    let other = Model::load("llama")?;
    let says =
        ["encoder.layer.0.attention.self.query.lora_A.weight`: is missing", "q_proj.lora_A.weight` is unexpected"];
    let modules = serde_json::json!(["query", "value"]);
    assert_error_says(load(changed(&other, |json| json["target_modules"] = modules.clone(), |_| ()).path()), &says);
    // Only one of its two layers.
    let first = load_peft(model.folder.join("adapter"), "default", model.layout, &model.named(&blocks)[..1]);
    assert_error_says(first, &["encoder.layer.1", "unexpected"]);

    let folder = tempfile::tempdir().expect("a folder");
    assert_error_says(load(folder.path()), &["adapter_config.json", "can't read"]);
    std::fs::write(folder.path().join("adapter_config.json"), "{").expect("a file");
    assert_error_says(load(folder.path()), &["adapter_config.json", "JSON"]);
    std::fs::copy(model.folder.join("adapter/adapter_config.json"), folder.path().join("adapter_config.json"))
        .expect("a copy");
    assert_error_says(load(folder.path()), &["adapter_model.safetensors", "can't read"]);
    let whole = std::fs::read(model.folder.join("adapter/adapter_model.safetensors")).expect("a file");
    std::fs::write(folder.path().join("adapter_model.safetensors"), &whole[..whole.len() / 2]).expect("a file");
    assert_error_says(load(folder.path()), &["adapter_model.safetensors", "safetensors"]);
    Ok(())
}

#[test]
fn adapters_that_no_file_can_hold_are_errors() -> Result<()> {
    let model = Model::load("bert")?;
    let base = model.blocks(DType::F32)?;
    let folder = tempfile::tempdir().expect("a folder");
    let save = |blocks: &[TransformerBlock], layout| {
        save_peft(folder.path().join("new"), "default", layout, &model.named(blocks), &PeftExtras::default())
    };
    assert_error_says(save(&base, Layout::Bert), &["default"]);
    assert_error_says(save(&[], Layout::Bert), &["at least one layer"]);
    let adapted = |rank, seed| crate::adapted(&base[0], "default", &LoraConfig::new(rank, 3.0), seed);
    assert_error_says(save(&[adapted(2, 3)?, adapted(3, 3)?], Layout::Bert), &["same config", "rank 2", "rank 3"]);
    let odd: Result<(), Error> = save(&[adapted(2, 3)?], Layout::T5);
    assert!(odd.is_err());
    let (block, twice) = (adapted(2, 3)?, PeftExtras::default());
    let layers = [("encoder.layer.0", &block), ("encoder.layer.0", &block)];
    let twice = save_peft(folder.path().join("new"), "default", Layout::Bert, &layers, &twice);
    assert_error_says(twice, &["a path of its own", "encoder.layer.0", "twice"]);
    assert!(!folder.path().join("new").exists());
    Ok(())
}
