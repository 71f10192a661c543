/// Path and bytes of each file of the story's bundle.
const BUNDLE_FILES: &[(&str, &[u8])] = bundle_files![
    "manifest.json",
    "schema.cedarschema",
    "entities.json",
    "policies/files.cedar",
    "policies/git.cedar",
    "policies/http.cedar",
    "policies/mcp.cedar",
    "policies/secrets.cedar",
    "policies/shell.cedar",
];
