//! Compiles `proto/` with protox, so that no `protoc` is needed, and writes the descriptors that
//! reflection serves.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use tonic_prost_build::FileDescriptorSet;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    // Reflection describes what clients can call, so the workers' contract has a compiler of its own.
    let public = compiled("tokenway/v1/inference.proto")?;
    let workers = compiled("tokenway/worker/v1/worker.proto")?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(
        out.join("tokenway_descriptors.bin"),
        public.encode_file_descriptor_set(),
    )?;
    // tonic-build's prost half has been called tonic-prost-build since tonic 0.14.
    let public = of_package(&public, "tokenway.v1");
    tonic_prost_build::configure()
        .codec_path("crate::proto::codec::SmallBufferCodec")
        .extern_path(".tokenway.v1.Tokens", "crate::proto::v1::Tokens")
        .compile_fds(public)?;
    let workers = of_package(&workers, "tokenway.worker.v1");
    let by_hand = |name| {
        let of_proto = format!(".tokenway.worker.v1.{name}");
        (of_proto, format!("crate::proto::worker::{name}"))
    };
    let (step, sequence_step) = (by_hand("Step"), by_hand("SequenceStep"));
    tonic_prost_build::configure()
        .codec_path("crate::proto::codec::LargeBufferCodec")
        .extern_path(step.0, step.1)
        .extern_path(sequence_step.0, sequence_step.1)
        .compile_fds(workers)?;
    Ok(())
}

fn compiled(file: &str) -> Result<protox::Compiler, Box<dyn Error>> {
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_file(file)?;
    Ok(compiler)
}

fn of_package(compiler: &protox::Compiler, package: &str) -> FileDescriptorSet {
    let mut files = compiler.file_descriptor_set();
    files.file.retain(|file| file.package() == package);
    files
}
