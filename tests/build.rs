//! Generates the messages of the Container Runtime Interface that the tests speak, in pure Rust.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/cri.proto")
        .customize(
            protobuf_codegen::Customize::default()
                .lite_runtime(true)
                .gen_mod_rs(true),
        )
        .cargo_out_dir("messages")
        .run_from_script();
}
