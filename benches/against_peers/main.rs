//! This crate's and candle's side of `against_peers.py` and `on_gpu.py`, which start this program and tell it, a line of
//! JSON at a time, what to compute and when to time it. The answers are JSON too.

mod job;
mod machine;

use std::collections::HashMap;
use std::io::{BufRead, Write, stdin, stdout};
use std::path::PathBuf;

use candle_core::{Device, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use job::{Contender, Job};

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Place {
    #[default]
    Cpu,
    Cuda,
}

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
enum Request {
    /// Makes a job of the tensors in a safetensors file.
    Load {
        id: u32,
        inputs: PathBuf,
        job: job::Description,
        #[serde(default)]
        device: Place,
    },
    /// Writes what the job gives to a safetensors file.
    Answer { id: u32, contender: Contender, to: PathBuf },
    /// Repeats the job and says the median time of a run.
    Time { id: u32, contender: Contender, warm_up_ms: u64, time_ms: u64 },
    /// Queues the job again and again and says the mean time of a run.
    TimeQueued { id: u32, contender: Contender, warm_up_ms: u64, time_ms: u64 },
    /// Drops the job.
    Forget { id: u32 },
    /// Reads memory with all threads and says how fast.
    Read { bytes: usize, warm_up_ms: u64, time_ms: u64 },
    /// Repeats the product of two square matrices and says the median time.
    Matmul { size: usize, warm_up_ms: u64, time_ms: u64 },
    /// The most memory that this process has held so far, and holds now.
    Memory,
}

#[derive(Default)]
struct Server {
    jobs: HashMap<u32, Job>,
    /// One for all jobs, from the first that asks for it.
    cuda: Option<Device>,
}

impl Server {
    fn device(&mut self, place: Place) -> Result<Device> {
        match (place, &self.cuda) {
            (Place::Cpu, _) => Ok(Device::Cpu),
            (Place::Cuda, Some(device)) => Ok(device.clone()),
            (Place::Cuda, None) => Ok(self.cuda.insert(Device::new_cuda(0)?).clone()),
        }
    }

    fn job(&self, id: u32) -> Result<&Job> {
        self.jobs.get(&id).ok_or_else(|| unknown(id))
    }

    fn answer(&mut self, request: Request) -> Result<Value> {
        Ok(match request {
            Request::Load { id, inputs, job, device } => {
                let device = self.device(device)?;
                self.jobs.insert(id, Job::load(inputs, job, device)?);
                json!({})
            }
            Request::Answer { id, contender, to } => {
                let job = self.job(id)?;
                let saved = job.run(contender).and_then(|answer| {
                    candle_core::safetensors::save(&answer.into_iter().collect::<HashMap<_, _>>(), to)
                });
                // After an error too: only now does the driver take back the memory.
                job.device().synchronize()?;
                saved.map(|()| json!({}))?
            }
            Request::Time { id, contender, warm_up_ms, time_ms } => {
                let job = self.job(id)?;
                json!({ "median_ms": machine::median_ms(warm_up_ms, time_ms, || job.run(contender).map(drop))? })
            }
            Request::TimeQueued { id, contender, warm_up_ms, time_ms } => {
                let job = self.job(id)?;
                let run = || job.run(contender).map(drop);
                json!({ "mean_ms": machine::queued_ms(job.device(), warm_up_ms, time_ms, run)? })
            }
            Request::Forget { id } => {
                let job = self.jobs.remove(&id).ok_or_else(|| unknown(id))?;
                let device = job.device().clone();
                drop(job);
                device.synchronize()?;
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
}

fn unknown(id: u32) -> candle_core::Error {
    candle_core::Error::msg(format!("expected the id of a loaded job, got {id}"))
}

fn main() -> std::io::Result<()> {
    if !std::env::args().any(|argument| argument == "--serve") {
        println!("skipped: python benches/against_peers.py and benches/on_gpu.py run this");
        return Ok(());
    }
    let mut server = Server::default();
    for line in stdin().lock().lines() {
        let reply = match serde_json::from_str(&line?) {
            Ok(request) => server.answer(request).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let mut stdout = stdout().lock();
        writeln!(stdout, "{}", reply.unwrap_or_else(|error| json!({ "error": error })))?;
        stdout.flush()?;
    }
    Ok(())
}
