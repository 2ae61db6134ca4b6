//! The lecture notes on attention, step by step, with their own sentences and numbers.
//!
//! Scores, weights and context of "Your journey starts with one step"; "The cat sat" through a layer with W_Q, W_K and
//! W_V; why scores are divided by sqrt(head_dim); and what trainable weights add. Every number is computed while the
//! program runs, except those that it marks as claims of the notes.
//!
//! ```text
//! cargo run --release --example step_by_step
//! ```

mod cat_sat;
mod journey;
mod page;
mod scale;
mod trainable;

use std::io::{self, ErrorKind, Write};

use anyhow::Result;

fn main() -> Result<()> {
    match tell(&mut io::stdout().lock()) {
        // As in `step_by_step | head`, which closes the pipe early.
        Err(error) if error.downcast_ref().map(io::Error::kind) == Some(ErrorKind::BrokenPipe) => Ok(()),
        result => result,
    }
}

fn tell(out: &mut impl Write) -> Result<()> {
    writeln!(out, "ATTENTION, STEP BY STEP\n")?;
    writeln!(out, "Every number below is computed now, except where it says \"the notes say\".")?;
    journey::scores(out)?;
    journey::weights(out)?;
    journey::extreme_scores(out)?;
    journey::context(out)?;
    journey::wrong_z2(out)?;
    journey::all_contexts(out)?;
    cat_sat::identity_weights(out)?;
    cat_sat::impossible_context(out)?;
    scale::six_and_four(out)?;
    scale::growing_head_dim(out)?;
    trainable::without(out)?;
    trainable::with(out)
}
