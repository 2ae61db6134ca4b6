//! This crate's and candle's side of `against_peers.py`, which starts this program and tells it, a line of JSON at a time,
//! what to compute and when to time it. The answers are JSON too.

mod job;
mod machine;

use std::collections::HashMap;
use std::io::{BufRead, Write, stdin, stdout};
use std::path::PathBuf;

use candle_core::Result;
use serde::Deserialize;
use serde_json::{Value, json};

use job::{Contender, Job};

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
enum Request {
    /// Makes a job of the tensors in a safetensors file.
    Load { id: u32, inputs: PathBuf, job: job::Description },
    /// Writes what the job gives to a safetensors file.
    Answer { id: u32, contender: Contender, to: PathBuf },
    /// Repeats the job and says the median time of a run.
    Time { id: u32, contender: Contender, warm_up_ms: u64, time_ms: u64 },
    /// Drops the job.
    Forget { id: u32 },
    /// Reads memory with all threads and says how fast.
    Read { bytes: usize, warm_up_ms: u64, time_ms: u64 },
    /// Repeats the product of two square matrices and says the median time.
    Matmul { size: usize, warm_up_ms: u64, time_ms: u64 },
    /// The most memory that this process has held so far, and holds now.
    Memory,
}

fn answer(jobs: &mut HashMap<u32, Job>, request: Request) -> Result<Value> {
    let job = |jobs: &mut HashMap<u32, Job>, id| {
        jobs.remove(&id).ok_or_else(|| candle_core::Error::msg(format!("expected the id of a loaded job, got {id}")))
    };
    Ok(match request {
        Request::Load { id, inputs, job } => {
            jobs.insert(id, Job::load(inputs, job)?);
            json!({})
        }
        Request::Answer { id, contender, to } => {
            let job = job(jobs, id)?;
            candle_core::safetensors::save(&job.run(contender)?.into_iter().collect::<HashMap<_, _>>(), to)?;
            jobs.insert(id, job);
            json!({})
        }
        Request::Time { id, contender, warm_up_ms, time_ms } => {
            let job = job(jobs, id)?;
            let median_ms = machine::median_ms(warm_up_ms, time_ms, || job.run(contender).map(drop))?;
            jobs.insert(id, job);
            json!({ "median_ms": median_ms })
        }
        Request::Forget { id } => {
            job(jobs, id)?;
            json!({})
        }
        Request::Read { bytes, warm_up_ms, time_ms } => {
            json!({ "median_ms": machine::read_ms(bytes, warm_up_ms, time_ms)? })
        }
        Request::Matmul { size, warm_up_ms, time_ms } => {
            json!({ "median_ms": machine::matmul_ms(size, warm_up_ms, time_ms)? })
        }
        Request::Memory => machine::memory()?,
    })
}

fn main() -> std::io::Result<()> {
    if !std::env::args().any(|argument| argument == "--serve") {
        println!("skipped: python benches/against_peers/against_peers.py runs this");
        return Ok(());
    }
    let mut jobs = HashMap::new();
    for line in stdin().lock().lines() {
        let reply = match serde_json::from_str(&line?) {
            Ok(request) => answer(&mut jobs, request).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let mut stdout = stdout().lock();
        writeln!(stdout, "{}", reply.unwrap_or_else(|error| json!({ "error": error })))?;
        stdout.flush()?;
    }
    Ok(())
}
