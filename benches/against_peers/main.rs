//! candle-attention's and candle's side of `against_peers.py` and `on_gpu.py`. They start this program and send it requests on
//! stdin, one line of JSON each. It answers each on stdout with one line of JSON.

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
enum DeviceName {
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
        device: DeviceName,
    },
    /// Writes the results of the job to a safetensors file.
    Answer { id: u32, contender: Contender, to: PathBuf },
    /// Repeats the job and answers with the median time of a run.
    Time { id: u32, contender: Contender, warm_up_ms: u64, time_ms: u64 },
    /// Queues the job again and again and answers with the mean time of a run.
    TimeQueued { id: u32, contender: Contender, warm_up_ms: u64, time_ms: u64 },
    /// Drops the job.
    Forget { id: u32 },
    /// Reads memory with all threads and answers with the median time.
    Read { bytes: usize, warm_up_ms: u64, time_ms: u64 },
    /// Repeats the product of two square matrices and answers with the median time.
    Matmul { size: usize, warm_up_ms: u64, time_ms: u64 },
    /// Keeps freed memory from now on, as programs that train do.
    KeepFreedMemory,
    /// The peak and the present memory of this process.
    Memory,
    /// Lets the peak memory start again from the present one.
    ResetPeak,
}

#[derive(Default)]
struct Server {
    jobs: HashMap<u32, Job>,
    /// One GPU for all jobs, opened by the first that asks for it.
    cuda: Option<Device>,
}

impl Server {
    fn device(&mut self, name: DeviceName) -> Result<Device> {
        match (name, &self.cuda) {
            (DeviceName::Cpu, _) => Ok(Device::Cpu),
            (DeviceName::Cuda, Some(device)) => Ok(device.clone()),
            (DeviceName::Cuda, None) => Ok(self.cuda.insert(Device::new_cuda(0)?).clone()),
        }
    }

    fn job(&self, id: u32) -> Result<&Job> {
        self.jobs.get(&id).ok_or_else(|| unknown(id))
    }

    fn answer(&mut self, request: Request) -> Result<Value> {
        Ok(match request {
            Request::Load { id, inputs, job, device } => {
                let device = self.device(device)?;
                self.jobs.insert(id, Job::load(&inputs, job, device)?);
                json!({})
            }
            Request::Answer { id, contender, to } => {
                let job = self.job(id)?;
                let saved = job.answer(contender).and_then(|answer| {
                    candle_core::safetensors::save(&answer.into_iter().collect::<HashMap<_, _>>(), to)
                });
                // After an error too: the driver takes back the memory only now.
                job.device().synchronize()?;
                saved.map(|()| json!({}))?
            }
            Request::Time { id, contender, warm_up_ms, time_ms } => {
                let job = self.job(id)?;
                json!({ "median_ms": machine::median_ms(warm_up_ms, time_ms, || job.run(contender))? })
            }
            Request::TimeQueued { id, contender, warm_up_ms, time_ms } => {
                let job = self.job(id)?;
                let run = || job.run(contender);
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
            Request::KeepFreedMemory => json!({ "keeps": candle_attention::train::keep_freed_memory() }),
            Request::Memory => machine::memory()?,
            Request::ResetPeak => {
                machine::reset_peak()?;
                json!({})
            }
        })
    }
}

fn unknown(id: u32) -> candle_core::Error {
    candle_core::Error::msg(format!("expected the id of a loaded job, got {id}"))
}

fn main() -> std::io::Result<()> {
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
