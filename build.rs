//! Compiles `proto/` with protox, so the build needs no `protoc`. Also writes the file descriptors for gRPC reflection.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    // Reflection must list the public API only, so the worker protocol is compiled separately.
    let public = compile("tokenway/v1/inference.proto")?;
    let workers = compile("tokenway/worker/v1/worker.proto")?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(
        out.join("tokenway_descriptors.bin"),
        public.encode_file_descriptor_set(),
    )?;
    // prost needs the imported files too, so this writes `tokenway.v1.rs` as well, without its messages. The public API
    // comes second and replaces that file.
    tonic_prost_build::configure()
        .codec_path("crate::proto::codec::LargeBufferCodec")
        .extern_path(".tokenway.v1", "crate::proto::v1")
        .extern_path(".tokenway.worker.v1.Step", "crate::proto::worker::Step")
        .extern_path(
            ".tokenway.worker.v1.SequenceStep",
            "crate::proto::worker::SequenceStep",
        )
        .compile_fds(workers.file_descriptor_set())?;
    tonic_prost_build::configure()
        .codec_path("crate::proto::codec::SmallBufferCodec")
        .extern_path(".tokenway.v1.Tokens", "crate::proto::v1::Tokens")
        .compile_fds(public.file_descriptor_set())?;
    Ok(())
}

fn compile(file: &str) -> Result<protox::Compiler, Box<dyn Error>> {
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_file(file)?;
    Ok(compiler)
}
