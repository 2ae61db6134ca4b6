//! A model of 8 entries, 2 heads, 1 layer and 12 words, as a folder that can then be broken.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

const WIDTH: usize = 8;
const WIDE: usize = 16;
const WORDS: [&str; 12] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "warm", "##er", "is"];
const POSITIONS: usize = 10;

pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let config = json!({
            "model_type": "bert", "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": WIDE, "hidden_act": "gelu", "max_position_embeddings": POSITIONS,
            "type_vocab_size": 2, "vocab_size": WORDS.len(), "layer_norm_eps": 1e-12,
        });
        folder.write("config.json", &config);
        folder.write("tokenizer.json", &tokenizer());
        folder.write_weights(&weights());
        folder
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    pub fn name(&self) -> String {
        self.0.path().to_str().unwrap().to_string()
    }

    pub fn write(&self, file: &str, json: &Value) {
        fs::create_dir_all(self.path(file).parent().unwrap()).unwrap();
        fs::write(self.path(file), json.to_string()).unwrap();
    }

    /// Changes one entry of a JSON file.
    pub fn set(&self, file: &str, pointer: &str, value: Value) {
        let mut json: Value = serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap();
        *json.pointer_mut(pointer).unwrap() = value;
        self.write(file, &json);
    }

    pub fn write_weights(&self, weights: &HashMap<String, Tensor>) {
        candle_core::safetensors::save(weights, self.path("model.safetensors")).unwrap();
    }
}

pub fn weights() -> HashMap<String, Tensor> {
    let mut weights = HashMap::new();
    let mut add = |name: &str, shape: &[usize]| {
        let numbers = (0..shape.iter().product::<usize>()).map(|i| ((i * 7 + name.len()) as f32).sin());
        weights.insert(name.to_string(), Tensor::from_iter(numbers, &Device::Cpu).unwrap().reshape(shape).unwrap());
    };
    for (name, rows) in [("word", WORDS.len()), ("position", POSITIONS), ("token_type", 2)] {
        add(&format!("embeddings.{name}_embeddings.weight"), &[rows, WIDTH]);
    }
    let layer = "encoder.layer.0";
    let attention = ["self.query", "self.key", "self.value", "output.dense"];
    let linear = attention.map(|name| (format!("attention.{name}"), WIDTH, WIDTH)).into_iter();
    let feed_forward = [("intermediate.dense".into(), WIDTH, WIDE), ("output.dense".into(), WIDE, WIDTH)];
    for (name, inputs, outputs) in linear.chain(feed_forward) {
        add(&format!("{layer}.{name}.weight"), &[outputs, inputs]);
        add(&format!("{layer}.{name}.bias"), &[outputs]);
    }
    for norm in ["embeddings".to_string(), format!("{layer}.attention.output"), format!("{layer}.output")] {
        add(&format!("{norm}.LayerNorm.weight"), &[WIDTH]);
        add(&format!("{norm}.LayerNorm.bias"), &[WIDTH]);
    }
    weights
}

fn tokenizer() -> Value {
    let vocab = WORDS.iter().enumerate().map(|(id, word)| (word.to_string(), id)).collect::<HashMap<_, _>>();
    let special = |id: usize| {
        json!({"id": id, "special": true, "content": WORDS[id], "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    let piece = |id: usize| json!({"id": WORDS[id], "ids": [id], "tokens": [WORDS[id]]});
    let start = json!({"SpecialToken": {"id": "[CLS]", "type_id": 0}});
    let end = json!({"SpecialToken": {"id": "[SEP]", "type_id": 0}});
    let sentence = json!({"Sequence": {"id": "A", "type_id": 0}});
    json!({
        "version": "1.0",
        // As all-MiniLM-L6-v2 has it: padded, and cut at another length than the model's.
        "truncation": {"max_length": 6, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [special(0), special(1), special(2), special(3)],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": [start, sentence, end],
                           "pair": [start, sentence, end, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {"[CLS]": piece(2), "[SEP]": piece(3)}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    })
}
