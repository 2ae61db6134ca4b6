//! Heat maps as text, as pictures and as a page.

mod bad_input;
mod long_tokens;
mod page;
mod picture;
mod text;

use attention_heatmap::Heatmap;

/// Tokens that would act on a terminal, a page or a layout without protection.
const HOSTILE: [&str; 17] = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!--",
    "\"'`&amp;\\",
    "]]>",
    "%%data%%",
    "${alert(3)}",
    "a\x1b[2Jb\n\t",
    "\u{2028}\u{2029}",
    "\u{202e}gnp.exe",
    "\u{feff}",
    "\u{ffff}",
    "\0",
    "",
    "  ",
    "👨‍👩‍👧 猫猫 שלום مرحبا नमस्ते",
    "Z\u{301}\u{301}\u{301}\u{301}\u{301}\u{301}\u{301}\u{301}\u{301}a\u{335}lgo",
];

/// Rows of a softmax over scores that all differ: (heads, q_len, kv_len).
fn softmax(heads: usize, q_len: usize, kv_len: usize) -> Vec<f32> {
    let score = |i: usize| {
        let (head, query, key) = (i / (q_len * kv_len), i / kv_len % q_len, i % kv_len);
        let distance = (query as f64 - key as f64 - head as f64).abs();
        4.0 * (0.7 * i as f64).sin() / (1.0 + distance) - 0.3 * distance
    };
    let exp = (0..heads * q_len * kv_len).map(|i| score(i).exp()).collect::<Vec<_>>();
    let rows = exp.chunks(kv_len).map(|row| (row, row.iter().sum::<f64>()));
    rows.flat_map(|(row, sum)| row.iter().map(move |exp| (exp / sum) as f32)).collect()
}

/// Weights that rise evenly from 0 to 1: (tokens, tokens).
fn ramp(tokens: usize) -> Vec<f32> {
    let cells = tokens * tokens;
    (0..cells).map(|cell| cell as f32 / (cells - 1).max(1) as f32).collect()
}

/// Every token attends only to itself: (tokens, tokens).
fn identity(tokens: usize) -> Vec<f32> {
    (0..tokens * tokens).map(|cell| if cell % (tokens + 1) == 0 { 1.0 } else { 0.0 }).collect()
}

fn words(count: usize) -> Vec<String> {
    let lengths = ["a", "the", "attention", "is", "unbelievably", "low"];
    (0..count).map(|i| format!("{}{i}", lengths[i % lengths.len()])).collect()
}

fn heads(heads: usize, tokens: usize) -> Heatmap {
    Heatmap::new(&softmax(heads, tokens, tokens), &words(tokens)).unwrap()
}

fn hostile() -> Heatmap {
    Heatmap::new(&softmax(2, HOSTILE.len(), HOSTILE.len()), &HOSTILE).unwrap()
}
