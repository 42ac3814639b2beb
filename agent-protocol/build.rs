//! Generates the message types from `proto/`, in pure Rust: no `protoc` is needed.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/agent.proto")
        .input("proto/ttrpc.proto")
        .customize(
            protobuf_codegen::Customize::default()
                .lite_runtime(true)
                .gen_mod_rs(true),
        )
        .cargo_out_dir("messages")
        .run_from_script();
}
