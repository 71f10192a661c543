//! Prints the OpenAPI document: `cargo run -p tidelock-gateway --example openapi > docs/openapi.json`.

fn main() {
    print!("{}", tidelock_gateway::openapi_document());
}
