//! Turns the protobuf contract into Rust types, without `protoc` and without the server.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let contract = "../proto/obscura/v1/obscura.proto";
    println!("cargo:rerun-if-changed={contract}");
    let descriptors = protox::compile([contract], ["../proto"])?;
    prost_build::Config::new().bytes(["."]).compile_fds(descriptors)?;
    Ok(())
}
