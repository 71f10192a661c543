//! Rego rules compiled for the register machine, with every error made visible.
//!
//! The machine takes an error inside a rule for a rule that did not match, and two different values of
//! one rule for none; a key that an object gets twice keeps the last value. A `deny` that depends on any
//! of these would be skipped and the request allowed. So the program is rewritten after compiling:
//! built-ins and operators are called through guards that stop the evaluation, the definitions of a rule
//! become rules of their own whose values are compared, and before a key is set the guard sees what it
//! holds. What the machine would take silently (too many arguments, unbounded depth) is refused here.

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU32, NonZeroUsize};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use regorus::languages::rego::compiler::Compiler;
use regorus::rvm::instructions::{
    ArrayCreateParams, BuiltinCallParams, FunctionCallParams, GuardMode, Instruction,
    LiteralOrRegister, LoopMode, LoopStartParams,
};
use regorus::rvm::program::{BuiltinInfo, RuleInfo, RuleType};
use regorus::rvm::vm::VmError;
use regorus::rvm::{Program, RegoVM};
use regorus::utils::limits::PolicyLengthConfig;
use regorus::{Engine, Value};

use crate::error::clip;
use crate::limits::{
    FILE_BYTES_MAX, REGO_FUEL, REGO_LINE_CHARACTERS_MAX, REGO_RULE_DEPTH_MAX, REGO_WITH_DEPTH,
};
use crate::rego_builtins::{OPERATORS, Stop, begin, guarded, stopped};
use crate::rego_host::{HOST, Shared, within};
use crate::rego_rewrite::{
    self, EACH, ENTRIES, FIELDS, MEMBER, MERGE, NONE, REPLACED, Refusal, Rewritten, SOME, Site,
    Target,
};
use crate::rego_source::{Finding, defined, findings, scan};
use crate::rego_text::{RESERVED, Text, author_words, unmade};

/// Registers of a machine's window.
const REGISTERS_MAX: u8 = u8::MAX;
/// The register of a rule's value.
const RESULT: u8 = 0;
/// Arguments that a call carries; the machine drops the others without a word.
const ARGUMENTS_MAX: usize = 8;

impl From<Refusal> for Fault {
    fn from((file, line, message): Refusal) -> Self {
        Self {
            file,
            line,
            message: clip(&message),
        }
    }
}

/// One policy file.
pub(crate) struct Module<'a> {
    pub(crate) path: &'a str,
    pub(crate) text: &'a str,
}

/// What keeps rules from being compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) file: String,
    pub(crate) line: usize,
    pub(crate) message: String,
}

impl Fault {
    fn new(file: &str, line: usize, message: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            line,
            message: message.into(),
        }
    }

    /// The fault where its author wrote it.
    fn at(mut self, texts: &[Text]) -> Self {
        if let Some(text) = texts.iter().find(|text| text.path == self.file) {
            self.line = text.line(self.line);
        }
        self.message = author_words(&self.message);
        self
    }

    /// The engine's message, without the picture of the source that it draws around it.
    fn read(error: &anyhow::Error, file: &str) -> Self {
        let text = format!("{error:#}");
        let mut at = (file.to_owned(), 1);
        let mut message = None;
        for line in text.lines().map(str::trim) {
            if let Some(place) = line.strip_prefix("--> ") {
                let mut parts = place.rsplitn(3, ':').skip(1);
                if let (Some(number), Some(name)) = (parts.next(), parts.next()) {
                    at = (name.to_owned(), number.parse().unwrap_or(1));
                }
            } else if let Some(said) = line.strip_prefix("error: ") {
                message = Some(said.to_owned());
            }
        }
        let message = message.unwrap_or_else(|| text.replace('\n', " "));
        Self::new(&at.0, at.1, clip(&message))
    }
}

/// Parses texts, within the bounds of the parser's work.
pub(crate) fn read(texts: &[Text]) -> Result<Engine, Fault> {
    let mut engine = Engine::new();
    engine.set_policy_length_config(PolicyLengthConfig {
        max_col: NonZeroU32::new(REGO_LINE_CHARACTERS_MAX).unwrap_or(NonZeroU32::MIN),
        max_file_bytes: NonZeroUsize::new(2 * FILE_BYTES_MAX).unwrap_or(NonZeroUsize::MIN),
        ..PolicyLengthConfig::default()
    });
    for text in texts {
        scan(&text.text)
            .map_err(|(line, message)| Fault::new(&text.path, text.line(line), message))?;
        engine
            .add_policy(text.path.clone(), text.text.clone())
            .map_err(|error| Fault::read(&error, &text.path).at(texts))?;
    }
    Ok(engine)
}

/// What this node does not run, with its file.
pub(crate) type Found = Vec<(String, Finding)>;

/// Parses modules: what is to be compiled, with what they have that this node does not run.
pub(crate) fn parse(modules: &[Module<'_>]) -> Result<(Engine, Rewritten, Found), Fault> {
    let texts = modules
        .iter()
        .map(|module| Text::new(module.path, module.text))
        .collect();
    let rewritten = rego_rewrite::first(texts).map_err(Fault::from)?;
    let mut engine = read(&rewritten.texts)?;
    let parsed = engine.get_modules();
    let functions = defined(parsed.iter().map(AsRef::as_ref));
    let mut found = Vec::new();
    for module in parsed.iter() {
        let path = module.package.span.source.get_path();
        found.extend(
            findings(module, &functions)
                .into_iter()
                .map(|finding| (path.clone(), finding)),
        );
    }
    Ok((engine, rewritten, found))
}

/// Compiled rules with one entry point. Immutable: each run has a machine of its own.
pub(crate) struct Rules {
    shared: Arc<Shared>,
    data: Value,
}

impl Rules {
    /// Compiles what the entry point needs.
    pub(crate) fn compile(modules: &[Module<'_>], data: Value, entry: &str) -> Result<Self, Fault> {
        let first = modules.first().map_or("policies", |module| module.path);
        let (engine, rewritten, found) = parse(modules)?;
        if let Some((path, finding)) = found.into_iter().next() {
            let message = format!("`{}` is not allowed: {}", finding.name, finding.reason);
            return Err(Fault::new(&path, finding.line, message));
        }
        let made = data.as_object().is_ok_and(|fields| {
            let mut names = fields.keys();
            names.any(|name| matches!(name, Value::String(name) if name.starts_with(RESERVED)))
        });
        if made {
            let message = format!("names in the data that begin with `{RESERVED}` are reserved");
            return Err(Fault::new(first, 1, message));
        }
        let (rewritten, mut engine) =
            rego_rewrite::rest(rewritten, engine, entry).map_err(Fault::from)?;
        let texts = &rewritten.texts;
        let failed = |error: &anyhow::Error| Fault::read(error, first).at(texts);
        engine
            .add_data(data.clone())
            .map_err(|error| failed(&error))?;
        let entry = rewritten.entry.as_str();
        let mut entries = vec![entry];
        entries.extend(rewritten.sites.iter().map(|site| site.rule.as_str()));
        let policy = engine
            .compile_with_entrypoint(&entry.into())
            .map_err(|error| failed(&error))?;
        let names: Vec<String> = (0..rewritten.sites.len())
            .flat_map(|site| [format!("{SOME}{site}"), format!("{NONE}{site}")])
            .collect();
        let mut hosts = vec![
            (MERGE, 1),
            (FIELDS, 2),
            (EACH, 2),
            (ENTRIES, 2),
            (MEMBER, 2),
        ];
        hosts.extend(names.iter().map(|name| (name.as_str(), 2)));
        let program = Compiler::compile_from_policy_with_host_await(&policy, &entries, &hosts)
            .map_err(|error| failed(&anyhow::Error::new(error)))?;
        let mut program = Arc::unwrap_or_clone(program);
        Hardening::new(&mut program, &rewritten.sites)
            .run()
            .map_err(|fault| fault.at(texts))?;
        let rules = Self {
            shared: Arc::new(Shared {
                program: Arc::new(program),
                sites: rewritten.sites,
            }),
            data,
        };
        machine(&rules.shared.program, rules.data.clone())
            .map_err(|error| Fault::new(first, 1, clip(&error.to_string())))?;
        Ok(rules)
    }

    /// Evaluates the entry point for an input. Nothing of an earlier run is left.
    pub(crate) fn run(&self, input: Value) -> Result<Value, Stop> {
        begin();
        // Functions of the engine can panic, for instance on an empty text to look for. The machine is
        // thrown away, so nothing half done is seen again.
        let said = catch_unwind(AssertUnwindSafe(|| {
            within(&self.shared, &self.data, input, 0)
        }))
        .map_err(|_| Stop::Error("the engine panicked".to_owned()))?;
        // A guard's word first: what the machine says of it is only its dress.
        match (stopped(), said) {
            (Some(stop), _) => Err(stop),
            (None, Ok(value)) => Ok(value),
            (None, Err(error)) => Err(Stop::of(&error)),
        }
    }
}

/// A machine with a program and data, ready for an input.
pub(crate) fn machine(program: &Arc<Program>, data: Value) -> Result<RegoVM, VmError> {
    let mut machine = RegoVM::new();
    machine.load_program(Arc::clone(program));
    machine.set_data(data)?;
    machine.set_max_instructions(REGO_FUEL);
    machine.set_strict_builtin_errors(true);
    Ok(machine)
}

/// The rewriting of one program.
struct Hardening<'p> {
    program: &'p mut Program,
    sites: &'p [Site],
    operators: BTreeMap<&'static str, u16>,
    /// Where the code of each body begins, with its rule, in the order of the code.
    owners: Vec<(usize, usize)>,
    /// Instructions to stand before the one of a number.
    inserted: BTreeMap<usize, Vec<Instruction>>,
    /// The parameters of loops that are inserted.
    wrapped: BTreeSet<u16>,
}

impl<'p> Hardening<'p> {
    fn new(program: &'p mut Program, sites: &'p [Site]) -> Self {
        let mut owners: Vec<(usize, usize)> = Vec::new();
        for (rule, info) in program.rule_infos.iter().enumerate() {
            let bodies = info.definitions.iter().flatten().copied();
            let blocks = info.destructuring_blocks.iter().flatten().copied();
            owners.extend(
                bodies
                    .chain(blocks)
                    .filter_map(|begin| Some((usize::try_from(begin).ok()?, rule))),
            );
        }
        owners.sort_unstable();
        Self {
            program,
            sites,
            operators: BTreeMap::new(),
            owners,
            inserted: BTreeMap::new(),
            wrapped: BTreeSet::new(),
        }
    }

    fn run(mut self) -> Result<(), Fault> {
        self.names();
        self.depths()?;
        self.rewrite()?;
        self.relocate()?;
        self.place_loops()?;
        self.split()?;
        self.replaceable()?;
        self.resolve()?;
        let program = self.program;
        program.recompute_host_await_presence();
        if program.has_host_await() {
            return Err(Fault::new(
                "policies",
                1,
                "an instruction that is not Rego's",
            ));
        }
        program
            .validate_limits()
            .map_err(|message| Fault::new("policies", 1, message))
    }

    fn fault(&self, at: usize, message: impl Into<String>) -> Fault {
        let span = self
            .program
            .instruction_spans
            .get(at)
            .and_then(Option::as_ref);
        let file = span.and_then(|span| span.get_source_name(&self.program.sources));
        Fault::new(
            file.unwrap_or("policies"),
            span.map_or(1, |span| span.line.max(1)),
            message,
        )
    }

    fn owner(&self, at: usize) -> Option<usize> {
        let before = self.owners.partition_point(|(begin, _)| *begin <= at);
        self.owners
            .get(before.checked_sub(1)?)
            .map(|(_, rule)| *rule)
    }

    /// Bounds how deep rules call rules: the machine calls itself for each, on a stack of fixed size.
    /// References that are made at run time count as references to all that they could mean.
    fn depths(&self) -> Result<(), Fault> {
        // Each with the rule, where it is called and how deep it counts.
        let mut calls: Vec<Vec<(usize, usize, usize)>> =
            vec![Vec::new(); self.program.rule_infos.len()];
        for (at, instruction) in self.program.instructions.iter().enumerate() {
            let Some(rule) = self.owner(at) else { continue };
            let mut targets = Vec::new();
            let mut levels = 1;
            match instruction {
                Instruction::HostAwait { .. } => {
                    let name = self
                        .asked(at)
                        .ok_or_else(|| self.fault(at, "an instruction that is not Rego's"))?;
                    let site = name.strip_prefix(SOME).or_else(|| name.strip_prefix(NONE));
                    if let Some(site) = site.and_then(|number| number.parse::<usize>().ok()) {
                        let held = self.sites.get(site).and_then(|site| self.rule(&site.rule));
                        targets.push(held.ok_or_else(|| self.fault(at, "a call of nothing"))?);
                        levels = REGO_WITH_DEPTH;
                    }
                }
                Instruction::CallRule { rule_index, .. } => targets.push(usize::from(*rule_index)),
                Instruction::FunctionCall { params_index } => {
                    let params = self
                        .program
                        .instruction_data
                        .get_function_call_params(*params_index)
                        .ok_or_else(|| self.fault(at, "a call without parameters"))?;
                    targets.push(usize::from(params.func_rule_index));
                }
                Instruction::VirtualDataDocumentLookup { params_index } => {
                    let params = self
                        .program
                        .instruction_data
                        .get_virtual_data_document_lookup_params(*params_index)
                        .ok_or_else(|| self.fault(at, "a lookup without parameters"))?;
                    self.reachable(&params.path_components, &mut targets);
                }
                _ => {}
            }
            if let Some(calls) = calls.get_mut(rule) {
                calls.extend(targets.into_iter().map(|target| (target, at, levels)));
            }
        }
        let mut known = vec![None; calls.len()];
        for rule in 0..calls.len() {
            self.depth(rule, 0, &calls, &mut known)?;
        }
        Ok(())
    }

    fn depth(
        &self,
        rule: usize,
        level: usize,
        calls: &[Vec<(usize, usize, usize)>],
        known: &mut [Option<usize>],
    ) -> Result<usize, Fault> {
        if let Some(depth) = known.get(rule).copied().flatten() {
            return Ok(depth);
        }
        let mut deepest = 0;
        for (target, at, levels) in calls.get(rule).into_iter().flatten() {
            // A circle is endless, so it ends here too.
            if level >= REGO_RULE_DEPTH_MAX {
                return Err(self.fault(
                    *at,
                    format!("rules refer to rules more than {REGO_RULE_DEPTH_MAX} deep, or to themselves"),
                ));
            }
            deepest = deepest.max(self.depth(*target, level + 1, calls, known)? + levels);
            if deepest > REGO_RULE_DEPTH_MAX {
                return Err(self.fault(
                    *at,
                    format!("rules refer to rules more than {REGO_RULE_DEPTH_MAX} deep"),
                ));
            }
        }
        if let Some(depth) = known.get_mut(rule) {
            *depth = Some(deepest);
        }
        Ok(deepest)
    }

    /// The rule of a name.
    fn rule(&self, name: &str) -> Option<usize> {
        let rules = &self.program.rule_infos;
        rules.iter().position(|info| info.name == name)
    }

    /// What rewritten rules ask of the node with an instruction; nothing if they did not write it.
    fn asked(&self, at: usize) -> Option<&str> {
        let Some(Instruction::HostAwait { id, .. }) = self.program.instructions.get(at) else {
            return None;
        };
        match self.program.instructions.get(at.checked_sub(1)?) {
            Some(Instruction::Load { dest, literal_idx }) if dest == id => {
                match self.program.literals.get(usize::from(*literal_idx)) {
                    Some(Value::String(name)) if name.starts_with(RESERVED) => Some(name.as_ref()),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// Gives what has a made name the author's again, and hides rules that the author did not write from
    /// documents.
    fn names(&mut self) {
        for literal in &mut self.program.literals {
            if let Value::String(name) = &*literal
                && let Some(name) = unmade(name)
            {
                *literal = Value::from(name);
            }
        }
        self.program.rule_tree = shown(&self.program.rule_tree);
    }

    /// Where rules are in what a reference can come to rest on: nothing if that is no package.
    fn packages(&self, path: &[LiteralOrRegister]) -> Option<Value> {
        let mut nodes = vec![&self.program.rule_tree[&Value::from("data")]];
        for component in path {
            nodes = nodes
                .into_iter()
                .filter_map(|node| node.as_object().ok())
                .flat_map(|children| -> Vec<&Value> {
                    match component {
                        LiteralOrRegister::Literal(index) => self
                            .program
                            .literals
                            .get(usize::from(*index))
                            .and_then(|key| children.get(key))
                            .into_iter()
                            .collect(),
                        LiteralOrRegister::Register(_) => children.values().collect(),
                    }
                })
                .collect();
        }
        nodes.retain(|node| node.as_object().is_ok());
        (!nodes.is_empty()).then(|| shape(&nodes))
    }

    /// Takes rules that are undefined out of a package that is read as a document: the machine puts values
    /// in it that do not exist.
    fn guard_package(&mut self, at: usize, params_index: u16) -> Result<(), Fault> {
        let data = &self.program.instruction_data;
        let params = data
            .get_virtual_data_document_lookup_params(params_index)
            .ok_or_else(|| self.fault(at, "a lookup without parameters"))?;
        let (dest, path) = (params.dest, params.path_components.clone());
        let Some(shape) = self.packages(&path) else {
            return Ok(());
        };
        let held = self.free_register(at)?;
        let literal_idx = u16::try_from(self.program.add_literal(shape))
            .map_err(|_| Fault::new("policies", 1, "too many literals"))?;
        let load = Instruction::Load {
            dest: held,
            literal_idx,
        };
        let defined = self.operator("#defined", dest, dest, held);
        self.inserted
            .entry(at + 1)
            .or_default()
            .extend([load, defined]);
        Ok(())
    }

    /// A register that the rule does not use; its guards share it.
    fn free_register(&self, at: usize) -> Result<u8, Fault> {
        let rule = self
            .owner(at)
            .ok_or_else(|| self.fault(at, "code outside a rule"))?;
        self.program
            .rule_infos
            .get(rule)
            .map(|info| info.num_registers)
            .filter(|registers| *registers < REGISTERS_MAX - 1)
            .ok_or_else(|| self.fault(at, "the rule is too large: split it"))
    }

    /// Rules whose values some `with` replaces look for the other value first.
    fn replaceable(&mut self) -> Result<(), Fault> {
        let names: BTreeSet<&str> = self
            .sites
            .iter()
            .flat_map(|site| &site.targets)
            .filter_map(|target| match target {
                Target::Rule(name) => Some(name.as_str()),
                Target::Input(_) | Target::Data(_) => None,
            })
            .collect();
        let too_large = || Fault::new("policies", 1, "too many rules");
        for name in names {
            let Some(rule) = self.rule(name) else {
                continue;
            };
            let Some(mut own) = self.program.rule_infos.get(rule).cloned() else {
                continue;
            };
            let rule_index = u16::try_from(rule).map_err(|_| too_large())?;
            let real = u16::try_from(self.program.rule_infos.len()).map_err(|_| too_large())?;
            let literal = |program: &mut Program, text: &str| {
                u16::try_from(program.add_literal(Value::from(text))).map_err(|_| too_large())
            };
            let replaced = literal(self.program, REPLACED)?;
            let key = literal(self.program, name)?;
            own.name = format!("{name}#");
            self.program.rule_infos.push(own);
            let other = u32::try_from(self.program.instructions.len()).unwrap_or(u32::MAX);
            self.append(Instruction::RuleInit {
                result_reg: 0,
                rule_index,
            });
            self.append(Instruction::LoadData { dest: 1 });
            self.append(Instruction::IndexLiteral {
                dest: 2,
                container: 1,
                literal_idx: replaced,
            });
            self.append(Instruction::IndexLiteral {
                dest: 3,
                container: 2,
                literal_idx: key,
            });
            self.append(Instruction::Guard {
                register: 3,
                mode: GuardMode::NotUndefined,
            });
            self.append(Instruction::Move { dest: 0, src: 3 });
            self.append(Instruction::RuleReturn {});
            let itself = u32::try_from(self.program.instructions.len()).unwrap_or(u32::MAX);
            self.append(Instruction::RuleInit {
                result_reg: 0,
                rule_index,
            });
            self.append(Instruction::CallRule {
                dest: 1,
                rule_index: real,
            });
            self.append(Instruction::Move { dest: 0, src: 1 });
            self.append(Instruction::RuleReturn {});
            if let Some(whole) = self.program.rule_infos.get_mut(rule) {
                whole.rule_type = RuleType::Complete;
                whole.definitions = Arc::new(vec![vec![other, itself]]);
                whole.destructuring_blocks = vec![None];
                whole.else_bodies = vec![vec![false, true]];
                whole.default_literal_index = None;
                whole.early_exit_on_first_success = false;
                whole.result_reg = 0;
                whole.num_registers = 4;
            }
            let widest = self.program.max_rule_window_size.max(4);
            self.program.max_rule_window_size = widest;
        }
        Ok(())
    }

    fn reachable(&self, path: &[LiteralOrRegister], targets: &mut Vec<usize>) {
        let mut node = &self.program.rule_tree[&Value::from("data")];
        for component in path {
            match component {
                LiteralOrRegister::Literal(index) => {
                    let Some(key) = self.program.literals.get(usize::from(*index)) else {
                        break;
                    };
                    node = &node[key];
                }
                LiteralOrRegister::Register(_) => break,
            }
            if !matches!(node, Value::Object(_)) {
                break;
            }
        }
        collect(node, targets);
    }

    /// Puts guarded functions in the place of operators, and looks at every call.
    fn rewrite(&mut self) -> Result<(), Fault> {
        let mut comprehensions: Vec<u8> = Vec::new();
        let mut called: BTreeSet<u8> = BTreeSet::new();
        let mut loops = 0_usize;
        let mut begun = None;
        for at in 0..self.program.instructions.len() {
            let Some(instruction) = self.program.instructions.get(at).copied() else {
                break;
            };
            let operator = match instruction {
                Instruction::Add { dest, left, right } => Some(("+", dest, left, right)),
                Instruction::Sub { dest, left, right } => Some(("-", dest, left, right)),
                Instruction::Mul { dest, left, right } => Some(("*", dest, left, right)),
                Instruction::Div { dest, left, right } => Some(("/", dest, left, right)),
                Instruction::Mod { dest, left, right } => Some(("%", dest, left, right)),
                Instruction::Lt { dest, left, right } => Some(("<", dest, left, right)),
                Instruction::Le { dest, left, right } => Some(("<=", dest, left, right)),
                Instruction::Gt { dest, left, right } => Some((">", dest, left, right)),
                Instruction::Ge { dest, left, right } => Some((">=", dest, left, right)),
                _ => None,
            };
            if let Some((name, dest, left, right)) = operator {
                let call = self.operator(name, dest, left, right);
                if let Some(place) = self.program.instructions.get_mut(at) {
                    *place = call;
                }
                continue;
            }
            match instruction {
                Instruction::RuleInit { .. } => {
                    called.clear();
                    loops = 0;
                    begun = Some(at);
                }
                // The compiler loads once for a body, where it needs them first. A loop that does not turn skips
                // that place, and what stands behind it would see nothing.
                Instruction::LoadInput { .. } | Instruction::LoadData { .. } => {
                    let begin = begun
                        .filter(|begin| self.owner(*begin) == self.owner(at))
                        .ok_or_else(|| self.fault(at, "a load outside a body"))?;
                    self.inserted
                        .entry(begin + 1)
                        .or_default()
                        .insert(0, instruction);
                }
                // The machine counts sets and objects too, and looks into them by the places of an array.
                Instruction::Count { dest, collection } => {
                    let call = self.operator("#length", dest, collection, collection);
                    if let Some(place) = self.program.instructions.get_mut(at) {
                        *place = call;
                    }
                }
                // A body whose loops find nothing has no value: the next `else` has its turn.
                Instruction::RuleReturn {} => self.defined(at, RESULT),
                Instruction::LoopStart { .. } => loops += 1,
                Instruction::LoopNext { .. } => loops = loops.saturating_sub(1),
                // The machine gives a variable, or a rule with an `else`, a value that does not exist, and goes
                // on. What it moves over the result of a call is whether that is another one.
                Instruction::Move { dest, src } if !called.contains(&dest) => {
                    self.defined(at, src);
                    if dest == RESULT && loops > 0 && !self.constant(at, src) {
                        self.one_value(at, src)?;
                    }
                }
                Instruction::BuiltinCall { params_index } => {
                    called.insert(self.check_builtin(at, params_index)?);
                }
                Instruction::FunctionCall { params_index } => {
                    called.insert(self.check_function(at, params_index)?);
                    self.guard_arguments(at, params_index)?;
                }
                Instruction::ComprehensionBegin { params_index } => {
                    let params = self
                        .program
                        .instruction_data
                        .get_comprehension_begin_params(params_index)
                        .ok_or_else(|| self.fault(at, "a comprehension without parameters"))?;
                    comprehensions.push(params.result_reg);
                    self.wrap(at)?;
                }
                Instruction::ComprehensionEnd {} => {
                    comprehensions.pop();
                    // Where it goes is set when everything has its place.
                    self.inserted
                        .entry(at)
                        .or_default()
                        .push(Instruction::LoopNext {
                            body_start: 0,
                            loop_end: 0,
                        });
                }
                Instruction::ComprehensionYield {
                    value_reg,
                    key_reg: None,
                } => self.defined(at, value_reg),
                Instruction::ComprehensionYield {
                    value_reg,
                    key_reg: Some(key),
                } => {
                    let object = comprehensions
                        .last()
                        .copied()
                        .ok_or_else(|| self.fault(at, "a yield outside a comprehension"))?;
                    self.guard_key(at, object, key, value_reg)?;
                }
                Instruction::ObjectSet { obj, key, value } => {
                    self.guard_key(at, obj, key, value)?;
                }
                Instruction::VirtualDataDocumentLookup { params_index } => {
                    self.guard_package(at, params_index)?;
                }
                Instruction::HostAwait { dest, arg, id } => {
                    if self.asked(at).is_none() {
                        return Err(self.fault(at, "an instruction that is not Rego's"));
                    }
                    let call = self.operator(HOST, dest, arg, id);
                    if let Some(place) = self.program.instructions.get_mut(at) {
                        *place = call;
                    }
                }
                Instruction::LoadContext { .. } | Instruction::PolicyCondition { .. } => {
                    return Err(self.fault(at, "an instruction that is not Rego's"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn operator(&mut self, name: &'static str, dest: u8, left: u8, right: u8) -> Instruction {
        let program = &mut *self.program;
        let builtin_index = *self.operators.entry(name).or_insert_with(|| {
            program.add_builtin_info(BuiltinInfo {
                name: name.to_owned(),
                num_args: 2,
            })
        });
        let params_index = program.add_builtin_call_params(BuiltinCallParams {
            dest,
            builtin_index,
            num_args: 2,
            args: [left, right, 0, 0, 0, 0, 0, 0],
        });
        Instruction::BuiltinCall { params_index }
    }

    /// Looks at a call of a built-in: the register of its result.
    fn check_builtin(&self, at: usize, params_index: u16) -> Result<u8, Fault> {
        let data = &self.program.instruction_data;
        let called = data
            .get_builtin_call_params(params_index)
            .and_then(|params| {
                Some((params, self.program.get_builtin_info(params.builtin_index)?))
            });
        let Some((params, info)) = called else {
            return Err(self.fault(at, "a call of nothing"));
        };
        if guarded(&info.name).is_none() && !OPERATORS.iter().any(|(name, _)| *name == info.name) {
            return Err(self.fault(at, format!("`{}` is not allowed", info.name)));
        }
        if u16::from(params.num_args) != info.num_args {
            return Err(self.fault(
                at,
                format!(
                    "`{}` takes {} arguments, not {}",
                    info.name, info.num_args, params.num_args
                ),
            ));
        }
        Ok(params.dest)
    }

    /// Looks at a call of a function: the register of its result.
    fn check_function(&self, at: usize, params_index: u16) -> Result<u8, Fault> {
        let data = &self.program.instruction_data;
        let called = data
            .get_function_call_params(params_index)
            .and_then(|params| {
                let info = self
                    .program
                    .rule_infos
                    .get(usize::from(params.func_rule_index))?;
                Some((params, info, info.function_info.as_ref()?))
            });
        let Some((params, info, function)) = called else {
            return Err(self.fault(at, "a call of what is no function"));
        };
        let takes = usize::try_from(function.num_params).unwrap_or(usize::MAX);
        if takes > ARGUMENTS_MAX {
            let message = format!("`{}` has more than {ARGUMENTS_MAX} arguments", info.name);
            return Err(self.fault(at, message));
        }
        if takes != usize::from(params.num_args) {
            return Err(self.fault(
                at,
                format!(
                    "`{}` takes {takes} arguments, not {}",
                    info.name, params.num_args
                ),
            ));
        }
        Ok(params.dest)
    }

    /// Puts the body of a comprehension into a loop of one turn. Where a condition in it fails outside of a loop,
    /// the machine fails the loop around the comprehension, and never leaves the comprehension.
    fn wrap(&mut self, at: usize) -> Result<(), Fault> {
        let collection = self.free_register(at)?;
        let turn = collection
            .checked_add(1)
            .ok_or_else(|| self.fault(at, "the rule is too large: split it"))?;
        let once = Value::from(vec![Value::Null]);
        let literal_idx = u16::try_from(self.program.add_literal(once))
            .map_err(|_| Fault::new("policies", 1, "too many literals"))?;
        let params_index = self
            .program
            .instruction_data
            .add_loop_params(LoopStartParams {
                mode: LoopMode::ForEach,
                collection,
                key_reg: turn,
                value_reg: turn,
                result_reg: turn,
                body_start: 0,
                loop_end: 0,
            });
        self.wrapped.insert(params_index);
        self.inserted.entry(at + 1).or_default().extend([
            Instruction::Load {
                dest: collection,
                literal_idx,
            },
            Instruction::LoopStart { params_index },
        ]);
        Ok(())
    }

    /// Sets where inserted loops begin and end, now that everything has its place.
    fn place_loops(&mut self) -> Result<(), Fault> {
        let program = &mut *self.program;
        let mut open: Vec<(usize, u16)> = Vec::new();
        for (at, instruction) in program.instructions.iter_mut().enumerate() {
            match instruction {
                Instruction::LoopStart { params_index } => open.push((at, *params_index)),
                Instruction::LoopNext {
                    body_start,
                    loop_end,
                } => {
                    let begun = open.pop().filter(|(_, index)| self.wrapped.contains(index));
                    let Some((start, index)) = begun else {
                        continue;
                    };
                    let ends = u16::try_from(start + 1)
                        .ok()
                        .zip(u16::try_from(at + 1).ok());
                    let params = program
                        .instruction_data
                        .loop_params
                        .get_mut(usize::from(index));
                    let (Some((first, behind)), Some(params)) = (ends, params) else {
                        return Err(Fault::new("policies", 1, "the policies are too large"));
                    };
                    (*body_start, *loop_end) = (first, behind);
                    (params.body_start, params.loop_end) = (first, behind);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether a register has just been loaded with a constant.
    fn constant(&self, at: usize, register: u8) -> bool {
        let before = at.checked_sub(1);
        match before.and_then(|before| self.program.instructions.get(before)) {
            Some(
                Instruction::LoadBool { dest, .. }
                | Instruction::LoadTrue { dest }
                | Instruction::LoadFalse { dest }
                | Instruction::LoadNull { dest }
                | Instruction::Load { dest, .. },
            ) => *dest == register,
            _ => false,
        }
    }

    /// A rule whose body holds more than once has one value, or none at all: the machine keeps the last.
    fn one_value(&mut self, at: usize, value: u8) -> Result<(), Fault> {
        let held = self.free_register(at)?;
        let same = self.operator("#value", held, RESULT, value);
        self.inserted.entry(at).or_default().push(same);
        Ok(())
    }

    /// A function that is given what is undefined is undefined; the machine runs one that ignores it.
    fn guard_arguments(&mut self, at: usize, params_index: u16) -> Result<(), Fault> {
        let data = &self.program.instruction_data;
        let Some(params) = data.get_function_call_params(params_index) else {
            return Err(self.fault(at, "a call of what is no function"));
        };
        let (dest, elements) = (params.dest, params.arg_registers().to_vec());
        if elements.is_empty() {
            return Ok(());
        }
        let held = self.free_register(at)?;
        // An array of what is undefined is undefined, and so is a call with one.
        let params_index =
            self.program
                .instruction_data
                .add_array_create_params(ArrayCreateParams {
                    dest: held,
                    elements,
                });
        let given = self.operator("#given", dest, dest, held);
        self.inserted
            .entry(at + 1)
            .or_default()
            .extend([Instruction::ArrayCreate { params_index }, given]);
        Ok(())
    }

    /// A head that is undefined adds nothing; the machine would add a value that does not exist.
    fn defined(&mut self, at: usize, register: u8) {
        self.inserted
            .entry(at)
            .or_default()
            .push(Instruction::Guard {
                register,
                mode: GuardMode::NotUndefined,
            });
    }

    /// Compares what an object holds under a key with what it is to hold.
    fn guard_key(&mut self, at: usize, object: u8, key: u8, value: u8) -> Result<(), Fault> {
        let held = self.free_register(at)?;
        self.defined(at, key);
        self.defined(at, value);
        let look = Instruction::Index {
            dest: held,
            container: object,
            key,
        };
        let same = self.operator("#same", held, held, value);
        self.inserted.entry(at).or_default().extend([look, same]);
        Ok(())
    }

    /// Makes room for what is inserted, and moves every reference to code.
    fn relocate(&mut self) -> Result<(), Fault> {
        if self.inserted.is_empty() {
            return Ok(());
        }
        let rules: BTreeSet<usize> = self
            .inserted
            .keys()
            .filter_map(|at| self.owner(*at))
            .collect();
        let inserted = std::mem::take(&mut self.inserted);
        let program = &mut *self.program;
        for rule in rules {
            if let Some(info) = program.rule_infos.get_mut(rule) {
                // Once for a rule: its guards share the registers.
                info.num_registers = info.num_registers.saturating_add(2);
            }
        }
        let old = std::mem::take(&mut program.instructions);
        let old_spans = std::mem::take(&mut program.instruction_spans);
        let mut moved = Vec::with_capacity(old.len() + 1);
        for (at, instruction) in old.into_iter().enumerate() {
            moved.push(program.instructions.len());
            let span = old_spans.get(at).cloned().flatten();
            for extra in inserted.get(&at).into_iter().flatten() {
                program.instructions.push(*extra);
                program.instruction_spans.push(span.clone());
            }
            program.instructions.push(instruction);
            program.instruction_spans.push(span);
        }
        moved.push(program.instructions.len());
        if program.instructions.len() > Program::MAX_INSTRUCTIONS {
            return Err(Fault::new("policies", 1, "the policies are too large"));
        }
        let to = |at: usize| moved.get(at).copied().unwrap_or(at);
        let short = |at: &mut u16| *at = u16::try_from(to(usize::from(*at))).unwrap_or(u16::MAX);
        let long = |at: u32| {
            let moved = to(usize::try_from(at).unwrap_or(usize::MAX));
            u32::try_from(moved).unwrap_or(u32::MAX)
        };
        for instruction in &mut program.instructions {
            match instruction {
                Instruction::LoopNext {
                    body_start,
                    loop_end,
                } => {
                    short(body_start);
                    short(loop_end);
                }
                Instruction::LogicalBlockStart { end_pc, .. }
                | Instruction::AllOfNext { end_pc, .. }
                | Instruction::AnyOfNext { end_pc, .. } => short(end_pc),
                _ => {}
            }
        }
        for params in &mut program.instruction_data.loop_params {
            short(&mut params.body_start);
            short(&mut params.loop_end);
        }
        for params in &mut program.instruction_data.comprehension_begin_params {
            short(&mut params.body_start);
            short(&mut params.comprehension_end);
        }
        for info in &mut program.rule_infos {
            let bodies = info.definitions.iter();
            let bodies = bodies.map(|body| body.iter().map(|at| long(*at)).collect());
            info.definitions = Arc::new(bodies.collect());
            for block in info.destructuring_blocks.iter_mut().flatten() {
                *block = long(*block);
            }
        }
        for at in program.entry_points.values_mut() {
            *at = to(*at);
        }
        program.main_entry_point = long(program.main_entry_point);
        Ok(())
    }

    /// Gives each definition of a rule with several a rule of its own, and the rule a body that asks
    /// them all and compares. Where all definitions give one constant there is nothing to compare.
    fn split(&mut self) -> Result<(), Fault> {
        for rule in 0..self.program.rule_infos.len() {
            let Some(info) = self.program.rule_infos.get(rule).cloned() else {
                break;
            };
            let several = info.definitions.len() > 1;
            if !several || info.rule_type != RuleType::Complete || info.early_exit_on_first_success
            {
                continue;
            }
            self.split_rule(rule, &info)?;
        }
        let widest = self
            .program
            .rule_infos
            .iter()
            .map(|info| info.num_registers);
        self.program.max_rule_window_size = widest.max().unwrap_or_default();
        Ok(())
    }

    fn split_rule(&mut self, rule: usize, info: &RuleInfo) -> Result<(), Fault> {
        let at = info
            .definitions
            .iter()
            .flatten()
            .next()
            .and_then(|begin| usize::try_from(*begin).ok())
            .unwrap_or_default();
        let fault = self.fault(at, "the rule is too large: split it");
        let too_large = || fault.clone();
        let value = info.num_registers;
        let boxed = value.checked_add(1).ok_or_else(too_large)?;
        let all = value.checked_add(2).ok_or_else(too_large)?;
        let first = value.checked_add(3).ok_or_else(too_large)?;
        let registers = value.checked_add(4).ok_or_else(too_large)?;
        let rule_index = u16::try_from(rule).map_err(|_| too_large())?;

        let mut parts = Vec::new();
        for (number, bodies) in info.definitions.iter().enumerate() {
            let mut part = info.clone();
            part.name = format!("{}#{number}", info.name);
            part.definitions = Arc::new(vec![bodies.clone()]);
            part.destructuring_blocks =
                vec![info.destructuring_blocks.get(number).copied().flatten()];
            part.else_bodies = vec![info.else_bodies.get(number).cloned().unwrap_or_default()];
            part.default_literal_index = None;
            let index = u16::try_from(self.program.rule_infos.len()).map_err(|_| too_large())?;
            self.program.rule_infos.push(part);
            parts.push(index);
        }
        let begin = u32::try_from(self.program.instructions.len()).unwrap_or(u32::MAX);
        self.append(Instruction::RuleInit {
            result_reg: info.result_reg,
            rule_index,
        });
        for (number, part) in parts.into_iter().enumerate() {
            let call = match &info.function_info {
                None => Instruction::CallRule {
                    dest: value,
                    rule_index: part,
                },
                Some(function) => {
                    let params = FunctionCallParams {
                        func_rule_index: part,
                        dest: value,
                        num_args: u8::try_from(function.num_params).unwrap_or(u8::MAX),
                        // The machine puts arguments behind its first register.
                        args: [1, 2, 3, 4, 5, 6, 7, 8],
                    };
                    Instruction::FunctionCall {
                        params_index: self.program.add_function_call_params(params),
                    }
                }
            };
            self.append(call);
            // In a box, so that a part without a value can be told from one whose value is null.
            let params_index =
                self.program
                    .instruction_data
                    .add_array_create_params(ArrayCreateParams {
                        dest: boxed,
                        elements: vec![value],
                    });
            self.append(Instruction::ArrayCreate { params_index });
            self.append(Instruction::CoalesceUndefinedToNull { register: boxed });
            let join = if number == 0 {
                Instruction::Move {
                    dest: all,
                    src: boxed,
                }
            } else {
                self.operator("#one", all, all, boxed)
            };
            self.append(join);
        }
        let zero = u16::try_from(self.program.add_literal(Value::from(0_u64)))
            .map_err(|_| Fault::new("policies", 1, "too many literals"))?;
        self.append(Instruction::Load {
            dest: first,
            literal_idx: zero,
        });
        self.append(Instruction::Index {
            dest: info.result_reg,
            container: all,
            key: first,
        });
        self.append(Instruction::RuleReturn {});
        if let Some(whole) = self.program.rule_infos.get_mut(rule) {
            whole.definitions = Arc::new(vec![vec![begin]]);
            whole.destructuring_blocks = vec![None];
            whole.else_bodies = vec![vec![false]];
            whole.num_registers = registers;
        }
        Ok(())
    }

    fn append(&mut self, instruction: Instruction) {
        self.program.instructions.push(instruction);
        self.program.instruction_spans.push(None);
    }

    /// Calls go through the guards from here on.
    fn resolve(&mut self) -> Result<(), Fault> {
        let mut resolved = Vec::with_capacity(self.program.builtin_info_table.len());
        for info in &self.program.builtin_info_table {
            let operator = OPERATORS
                .iter()
                .find(|(name, _)| *name == info.name)
                .map(|(_, function)| *function);
            let function = operator.or_else(|| guarded(&info.name)).ok_or_else(|| {
                Fault::new("policies", 1, format!("`{}` is not allowed", info.name))
            })?;
            resolved.push(function);
        }
        self.program.resolved_builtins = resolved;
        Ok(())
    }
}

/// Every rule in a part of the rule tree.
fn collect(node: &Value, rules: &mut Vec<usize>) {
    match node {
        Value::Number(_) => {
            rules.extend(
                node.as_u64()
                    .ok()
                    .and_then(|rule| usize::try_from(rule).ok()),
            );
        }
        Value::Object(fields) => fields.values().for_each(|field| collect(field, rules)),
        _ => {}
    }
}

/// A part of the rule tree as authors know it.
fn shown(node: &Value) -> Value {
    let Value::Object(fields) = node else {
        return node.clone();
    };
    let fields = fields.iter().filter_map(|(name, field)| {
        let name = match name {
            Value::String(made) if made.starts_with(RESERVED) => Value::from(unmade(made)?),
            other => other.clone(),
        };
        Some((name, shown(field)))
    });
    Value::from(fields.collect::<BTreeMap<_, _>>())
}

/// Where rules are in several parts of the rule tree together.
fn shape(nodes: &[&Value]) -> Value {
    let mut places: BTreeMap<&Value, Vec<&Value>> = BTreeMap::new();
    for fields in nodes.iter().filter_map(|node| node.as_object().ok()) {
        for (name, field) in fields.iter() {
            places.entry(name).or_default().push(field);
        }
    }
    if places.is_empty() {
        return Value::Null;
    }
    let places = places
        .into_iter()
        .map(|(name, nodes)| (name.clone(), shape(&nodes)));
    Value::from(places.collect::<BTreeMap<_, _>>())
}
