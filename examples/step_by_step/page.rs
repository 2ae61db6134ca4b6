//! Headings, vectors, rows and bars as text.

use std::io::Write;

use anyhow::Result;

/// A numbered step and the line under it.
pub fn heading(out: &mut impl Write, text: &str) -> Result<()> {
    Ok(writeln!(out, "\n\n{text}\n{}\n", "=".repeat(text.chars().count()))?)
}

/// `[0.4419, 0.6515, 0.5683]`: a vector with this many decimals.
pub fn vector(numbers: &[f32], decimals: usize) -> String {
    let numbers: Vec<_> = numbers.iter().map(|x| format!("{x:.decimals$}")).collect();
    format!("[{}]", numbers.join(", "))
}

/// A row of a table: all numbers have the same width, so that the columns are aligned.
pub fn row(numbers: &[f32], width: usize, decimals: usize) -> String {
    numbers.iter().map(|x| format!("{x:width$.decimals$}")).collect()
}

/// A weight from 0 to 1 as a bar of up to `width` characters.
pub fn bar(weight: f32, width: usize) -> String {
    "█".repeat((weight * width as f32).round() as usize)
}
