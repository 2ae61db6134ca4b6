//! Compiles kernels and the emulator into a shared library, which is kept for the next time.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::emulator_folder;

/// Of the kernels. `-O2` costs a tenth more time than `-O1` and runs as fast; the emulator itself takes most of the time.
/// No fused multiply-add: the bits would depend on the processor.
const FLAGS: [&str; 9] = [
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-w",
    "-DCUDA_ON_CPU",
];

/// A C++ compiler.
#[derive(Debug)]
pub struct Compiler {
    /// The program and its first arguments.
    command: Vec<String>,
    version: Vec<u8>,
}

impl Compiler {
    /// The compiler that `CXX` names, or else the first one that there is.
    pub fn find() -> Option<&'static Self> {
        static FOUND: OnceLock<Option<Compiler>> = OnceLock::new();
        // Miri can't start a process. A compiler for Windows doesn't know the calls of the system that the emulator needs.
        let can_be = cfg!(unix) && !cfg!(miri);
        let find = || {
            let asked = env::var("CXX").ok();
            let mut commands = asked.iter().map(String::as_str).chain(["c++", "g++", "clang++"]);
            commands.find_map(Self::new)
        };
        FOUND.get_or_init(|| can_be.then(find).flatten()).as_ref()
    }

    /// The compiler with this name, if it is there and makes code for this processor.
    fn new(command: &str) -> Option<Self> {
        let command: Vec<String> = command.split_whitespace().map(String::from).collect();
        let (program, arguments) = command.split_first()?;
        let ask = |what: &str| Command::new(program).args(arguments).arg(what).output().ok();
        let machine = String::from_utf8(ask("-dumpmachine")?.stdout).ok()?;
        let own = if env::consts::ARCH == "aarch64" { &["aarch64", "arm64"][..] } else { &[env::consts::ARCH] };
        let output = ask("--version")?;
        let is_right = output.status.success() && own.iter().any(|arch| machine.starts_with(arch));
        is_right.then_some(Self { command, version: output.stdout })
    }

    /// The shared library of a source and the emulator.
    ///
    /// # Errors
    ///
    /// What the compiler says.
    pub fn library(&self, source: &Path, defines: &[String], folders: &[PathBuf]) -> Result<PathBuf, String> {
        let core = self.core()?;
        let mut arguments = FLAGS.map(String::from).to_vec();
        arguments.extend(defines.iter().map(|define| format!("-D{define}")));
        arguments.push("-shared".into());
        let name = source.file_stem().unwrap_or_default().to_string_lossy();
        let inputs = [Path::new("-x"), Path::new("c++"), source, Path::new("-x"), Path::new("none"), &core];
        self.compile(
            &format!("{name}-{:016x}.so", self.hash(source, &arguments, folders)),
            &arguments,
            folders,
            &inputs,
        )
    }

    /// The emulator, compiled.
    fn core(&self) -> Result<PathBuf, String> {
        static CORE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        let compile = || {
            let source = emulator_folder().join("emulator.cpp");
            let mut arguments = FLAGS.map(String::from).to_vec();
            arguments.extend(["-O3".into(), "-c".into()]);
            let name = format!("emulator-{:016x}.o", self.hash(&source, &arguments, &[]));
            self.compile(&name, &arguments, &[], &[&source])
        };
        CORE.get_or_init(compile).clone()
    }

    /// Makes the file `name`, unless it is there.
    fn compile(
        &self,
        name: &str,
        arguments: &[String],
        folders: &[PathBuf],
        inputs: &[&Path],
    ) -> Result<PathBuf, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let made = target().join(name);
        if made.is_file() {
            return Ok(made);
        }
        let failed = |what: String| format!("{} {name}: {what}", self.command.join(" "));
        fs::create_dir_all(target()).map_err(|error| failed(error.to_string()))?;
        // Another process may make it too: what has its name is always whole.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let new = target().join(format!("{name}.{}.{number}.new", process::id()));
        let mut command = Command::new(&self.command[0]);
        command
            .args(&self.command[1..])
            .args(arguments)
            .args(folders.iter().map(|folder| format!("-I{}", folder.display())));
        let output = command.args(inputs).arg("-o").arg(&new).output().map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        fs::rename(&new, &made).map_err(|error| failed(error.to_string()))?;
        Ok(made)
    }

    /// Of all that the result depends on.
    fn hash(&self, source: &Path, arguments: &[String], folders: &[PathBuf]) -> u64 {
        let mut hash = Fnv::default();
        self.command.iter().for_each(|part| hash.add(part.as_bytes()));
        hash.add(&self.version);
        arguments.iter().for_each(|argument| hash.add(argument.as_bytes()));
        for file in with_included(source, folders) {
            hash.add(&fs::read(file).unwrap_or_default());
        }
        // The library holds the emulator too.
        if folders.contains(&emulator_folder()) {
            for file in with_included(&emulator_folder().join("emulator.cpp"), &[]) {
                hash.add(&fs::read(file).unwrap_or_default());
            }
        }
        hash.0
    }
}

/// Where compiled libraries are kept.
pub fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator")
}

/// A file and all that it includes, by `#include "..."`.
fn with_included(source: &Path, folders: &[PathBuf]) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut left = vec![source.to_owned()];
    while let Some(file) = left.pop() {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let own = file.parent().map(Path::to_owned);
        let names = text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.split('"').next());
        for name in names {
            let places = own.iter().chain(folders).map(|folder| folder.join(name));
            left.extend(places.filter(|place| place.is_file() && !found.contains(place)).take(1));
        }
        found.insert(file);
    }
    found
}

/// The hash FNV-1a, which is the same in every version of Rust.
pub struct Fnv(pub u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// Adds these bytes and their number.
    pub fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes.iter().chain(&bytes.len().to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
