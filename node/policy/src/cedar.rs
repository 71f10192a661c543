//! The Cedar engine: policies compiled once, requests judged against what was prepared.
//!
//! Everything that does not depend on the request is made at load: the schema, the names of entity
//! types, the actions, the declared attributes of each resource type, the graph of the bundle's
//! entities, the index over the policies' scopes. A request costs its own conversion and the
//! evaluation of the policies whose scope it meets; the number of policies and of entities in the
//! bundle does not matter.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::str::FromStr;
use std::sync::Arc;

use cedar_policy::{
    Authorizer, Context, Decision, Entities, Entity, EntityId, EntityTypeName, EntityUid,
    EvalResult, Policy, PolicyId, PolicySet, Request, Schema, SlotId, Template, ValidationMode,
    Validator, schema_str_to_json_with_resolved_types,
};
use cedar_policy_core::ast::{Expr, ExprKind};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::archive::{CEDAR, ENTITIES, Files, LINKS, POLICIES_DIR, SCHEMA};
use crate::error::{BundleError, chain, clip};
use crate::explain::{self, PolicyNote};
use crate::json;
use crate::limits::{
    ANCESTORS_MAX, ENTITIES_MAX, FAILURES_LISTED_MAX, LEVEL_MAX, POLICIES_MAX, POLICY_ID_BYTES_MAX,
    REACHED_ENTITIES_MAX, REACHED_FROM_ONE_MAX, SCHEMA_NAMES_MAX,
};
use crate::nesting::{check_schema, split_policies};
use crate::request::{Engine, Evaluation, Failure, PolicyRequest, Verdict, error_text};
use crate::scope::{Joined, ScopeIndex};
use crate::values::{RecordType, Types};

/// Type of the actions in Cedar's model. Schemas of bundles have no namespaces.
const ACTION: &str = "Action";

/// Compiled policies of one bundle. Made by loading a bundle; immutable.
pub struct CedarEngine {
    authorizer: Authorizer,
    schema: Schema,
    types: HashMap<String, EntityType>,
    actions: HashMap<String, Action>,
    index: ScopeIndex,
    entities: Entities,
    /// Entities that an entity of the bundle refers to in its attributes or tags. Absent: none.
    references: HashMap<EntityUid, Vec<EntityUid>>,
    /// How many steps from entity to entity the policies look.
    level: u32,
    policy_ids: Vec<String>,
    warnings: Vec<String>,
    /// Ids of the bundle's entities of each type, sorted: what a search can find.
    entity_ids: BTreeMap<String, Vec<String>>,
}

struct EntityType {
    name: EntityTypeName,
    attributes: Arc<RecordType>,
}

struct Action {
    entity: Entity,
    uid: EntityUid,
    /// What the schema declares the context to be.
    context: Arc<RecordType>,
}

impl CedarEngine {
    /// Compiles and validates the policy files of an archive.
    pub(crate) fn compile(files: &Files) -> Result<Self, BundleError> {
        let source = text(files, SCHEMA)?
            .ok_or_else(|| BundleError::schema(SCHEMA, "the bundle has no schema"))?;
        check_schema(source).map_err(|deep| BundleError::Schema {
            file: SCHEMA.to_owned(),
            message: format!("line {}: {}", deep.line, deep.message),
        })?;
        let declared = Declared::read(source)?;
        let (schema, schema_warnings) = Schema::from_cedarschema_str(source)
            .map_err(|error| BundleError::schema(SCHEMA, chain(&error)))?;
        let mut warnings: Vec<String> = schema_warnings
            .map(|warning| clip(&format!("{SCHEMA}: {warning}")))
            .collect();

        let policies = parse_policies(files)?;
        check_no_extensions(&policies)?;
        let validator = Validator::new(schema);
        let (level, odd) = validate(&validator, &policies)?;
        warnings.extend(odd);
        for template in policies.templates() {
            let links = policies.get_linked_policies(template.id().clone());
            if links.is_ok_and(|mut links| links.next().is_none()) {
                warnings.push(clip(&format!(
                    "template `{}` has no link in {LINKS}: it decides nothing",
                    id_of(template.id())
                )));
            }
        }
        let schema = validator.schema().clone();

        let entities = parse_entities(files, &schema)?;
        let references = references(&entities);
        check_reach(&references, level)?;
        let action_entities = schema
            .action_entities()
            .map_err(|error| BundleError::schema(SCHEMA, chain(&error)))?;
        let actions = actions(&schema, &declared, &action_entities)?;
        let mut policy_ids: Vec<String> = policies
            .policies()
            .map(|policy| id_of(policy.id()).to_owned())
            .collect();
        policy_ids.sort_unstable();
        let index = ScopeIndex::new(policies, &action_entities)
            .map_err(|error| BundleError::format(error.to_string()))?;
        let types = declared
            .types
            .into_iter()
            .map(|(name, attributes)| {
                let parsed = EntityTypeName::from_str(&name)
                    .map_err(|error| BundleError::schema(SCHEMA, error))?;
                Ok((
                    name,
                    EntityType {
                        name: parsed,
                        attributes,
                    },
                ))
            })
            .collect::<Result<_, BundleError>>()?;
        warnings.truncate(FAILURES_LISTED_MAX);
        let mut entity_ids: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for uid in entities.iter().map(Entity::uid) {
            let ids = entity_ids.entry(uid.type_name().to_string()).or_default();
            ids.push(uid.id().unescaped().to_owned());
        }
        entity_ids.values_mut().for_each(|ids| ids.sort_unstable());
        Ok(Self {
            authorizer: Authorizer::new(),
            schema,
            types,
            actions,
            index,
            entities,
            references,
            level,
            policy_ids,
            warnings,
            entity_ids,
        })
    }

    /// Ids of all policies, sorted.
    #[must_use]
    pub fn policy_ids(&self) -> &[String] {
        &self.policy_ids
    }

    /// What the compiler found odd without refusing it, for instance a policy that can never apply.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Ids of the bundle's entities of one type, sorted.
    #[must_use]
    pub fn entity_ids(&self, kind: &str) -> Vec<&str> {
        let ids = self.entity_ids.get(kind).into_iter().flatten();
        ids.map(String::as_str).collect()
    }

    /// The actions that the schema applies to some principal and resource.
    #[must_use]
    pub fn actions(&self) -> BTreeSet<String> {
        self.actions.keys().cloned().collect()
    }

    /// How many steps from entity to entity the policies look, and how many entities the bundle has.
    #[must_use]
    pub fn reach(&self) -> (u32, usize) {
        (self.level, self.entities.iter().count())
    }

    /// Whether the schema declares this member of an action's context.
    pub(crate) fn declares_context(&self, action: &str, member: &str) -> bool {
        self.actions
            .get(action)
            .is_some_and(|action| action.context.declares(member))
    }

    fn judge(&self, request: &PolicyRequest) -> Result<Joined, (Failure, String)> {
        let action = self.actions.get(&request.action).ok_or_else(|| {
            let message = format!("unknown action `{}`", request.action);
            (Failure::UnknownAction, message)
        })?;
        self.judge_known(action, request)
            .map_err(|message| (Failure::Request, message))
    }

    fn judge_known(&self, action: &Action, request: &PolicyRequest) -> Result<Joined, String> {
        let (judged, entities) = self.prepared(action, request)?;
        Ok(self
            .index
            .is_authorized(&self.authorizer, &judged, &entities))
    }

    /// The permits that come nearest to a request that none of them permits, and what does not hold.
    /// Empty where the request does not fit the schema. Decides nothing.
    #[must_use]
    pub fn explain(&self, request: &PolicyRequest) -> Vec<PolicyNote> {
        let prepared = self
            .actions
            .get(&request.action)
            .and_then(|action| self.prepared(action, request).ok());
        match prepared {
            Some((asked, entities)) => {
                let all = self.index.policy_set();
                explain::nearest(all, &self.authorizer, &asked, &entities)
            }
            None => Vec::new(),
        }
    }

    fn prepared(
        &self,
        action: &Action,
        request: &PolicyRequest,
    ) -> Result<(Request, Entities), String> {
        let principal_type = self.entity_type("principal", &request.principal_type)?;
        let resource_type = self.entity_type("resource", &request.resource_type)?;
        let principal = uid(&principal_type.name, &request.principal_id);
        let resource = uid(&resource_type.name, &request.resource_id);

        let mut mentioned = Vec::new();
        let context = context(request, &action.context, &mut mentioned)
            .map_err(|error| format!("context: {error}"))?;
        let resource_entity = self
            .resource(request, resource_type, &resource, &mut mentioned)
            .map_err(|error| format!("resource: {error}"))?;
        let entities = self.slice(action, &principal, &resource, resource_entity, mentioned)?;
        let judged = Request::new(
            principal,
            action.uid.clone(),
            resource,
            context,
            Some(&self.schema),
        )
        .map_err(|error| chain(&error))?;
        Ok((judged, entities))
    }

    fn entity_type(&self, role: &str, name: &str) -> Result<&EntityType, String> {
        self.types
            .get(name)
            .ok_or_else(|| format!("{role}: the schema has no entity type `{name}`"))
    }

    /// The resource as the request describes it, joined with what the bundle says of it. Attributes
    /// that the schema does not declare are dropped: no policy can look at them.
    fn resource(
        &self,
        request: &PolicyRequest,
        kind: &EntityType,
        uid: &EntityUid,
        mentioned: &mut Vec<EntityUid>,
    ) -> Result<Entity, String> {
        let stated = request
            .resource_attributes
            .iter()
            .filter(|(name, _)| kind.attributes.declares(name));
        let Some(entity) = self.entities.get(uid) else {
            let attributes = kind.attributes.read(stated, mentioned)?;
            return Entity::new_with_tags(uid.clone(), attributes, [], [])
                .map_err(|error| chain(&error));
        };
        kind.attributes.read_some(stated.clone(), 0, mentioned)?;
        let mut attributes: Map<String, Value> = stated
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        let Ok(Value::Object(mut described)) = entity.to_json_value() else {
            return Err(format!("{uid} of {ENTITIES} cannot be read"));
        };
        if let Some(Value::Object(known)) = described.remove("attrs") {
            for (name, value) in known {
                // What the bundle states was signed; what the request states was derived from its
                // id. If they disagree there is no safe choice between them.
                match attributes.get(&name) {
                    Some(other) if *other != value => {
                        return Err(format!(
                            "attribute `{name}` is one value in {ENTITIES} and another in the \
                             request"
                        ));
                    }
                    _ => _ = attributes.insert(name, value),
                }
            }
        }
        described.insert("attrs".to_owned(), Value::Object(attributes));
        Entity::from_json_value(Value::Object(described), Some(&self.schema))
            .map_err(|error| chain(&error))
    }

    /// The entities that this request can reach: its own three and those that its context mentions,
    /// and from these what attributes and tags refer to, as many steps as the policies look. Level
    /// validation has shown that they can look at nothing else, not at an entity that only a policy
    /// names either, so the rest of the bundle's entities need not be copied.
    fn slice(
        &self,
        action: &Action,
        principal: &EntityUid,
        resource_uid: &EntityUid,
        resource: Entity,
        mentioned: Vec<EntityUid>,
    ) -> Result<Entities, String> {
        let mut reached: HashSet<EntityUid> =
            HashSet::from([action.uid.clone(), resource_uid.clone()]);
        let mut next = mentioned;
        next.push(principal.clone());
        let mut slice = vec![action.entity.clone(), resource];
        for level in 1..=self.level {
            let mut beyond = Vec::new();
            if level == 1 {
                beyond.extend(self.references.get(resource_uid).into_iter().flatten());
            }
            for uid in &next {
                if reached.contains(uid) {
                    continue;
                }
                reached.insert(uid.clone());
                if let Some(entity) = self.entities.get(uid) {
                    if slice.len() >= REACHED_ENTITIES_MAX {
                        return Err(format!(
                            "the request reaches more than {REACHED_ENTITIES_MAX} entities of the bundle"
                        ));
                    }
                    slice.push(entity.clone());
                    beyond.extend(self.references.get(uid).into_iter().flatten());
                }
            }
            next = beyond.into_iter().cloned().collect();
        }
        Entities::from_entities(slice, None).map_err(|error| chain(&error))
    }
}

impl Engine for CedarEngine {
    fn evaluate(&self, request: &PolicyRequest) -> Evaluation {
        let Joined {
            decision,
            reasons,
            errors,
        } = match self.judge(request) {
            Ok(joined) => joined,
            Err((failure, message)) => return Evaluation::failed(failure, &message),
        };
        let names = |ids: &mut dyn Iterator<Item = &PolicyId>| -> Vec<String> {
            ids.map(|id| id_of(id).to_owned()).collect()
        };
        if errors.is_empty() {
            return Evaluation {
                verdict: match (decision, reasons.is_empty()) {
                    (Decision::Allow, _) => Verdict::Permit,
                    (Decision::Deny, false) => Verdict::Forbid,
                    (Decision::Deny, true) => Verdict::NoMatch,
                },
                policies: names(&mut reasons.iter()),
                errors: Vec::new(),
            };
        }
        // Cedar skips a policy that errors, a `forbid` too: here any error denies.
        let policies = names(&mut errors.iter().map(|(id, _)| id));
        let mut errors: Vec<String> = errors
            .iter()
            .map(|(_, message)| error_text(Failure::Policy, message))
            .collect();
        errors.sort_unstable();
        Evaluation {
            verdict: Verdict::Error,
            policies,
            errors,
        }
    }
}

/// What the schema declares, in the names that requests use.
struct Declared {
    /// Attributes of each entity type.
    types: BTreeMap<String, Arc<RecordType>>,
    /// Context of each action.
    contexts: HashMap<String, Arc<RecordType>>,
}

impl Declared {
    fn read(source: &str) -> Result<Self, BundleError> {
        let (resolved, _) = schema_str_to_json_with_resolved_types(source)
            .map_err(|error| BundleError::schema(SCHEMA, chain(&error)))?;
        let Value::Object(namespaces) = &resolved else {
            return Err(BundleError::schema(SCHEMA, "the schema is not an object"));
        };
        if names_extension(&resolved) {
            return Err(BundleError::schema(SCHEMA, NO_EXTENSIONS));
        }
        if names_control_character(&resolved) {
            return Err(BundleError::schema(
                SCHEMA,
                "a name has a control character: names are read by people and by other programs",
            ));
        }
        if let Some(named) = namespaces.keys().find(|name| !name.is_empty()) {
            return Err(BundleError::schema(
                SCHEMA,
                format!("namespace `{named}`: declare every type and action outside a namespace"),
            ));
        }
        let empty = Map::new();
        let part = |key: &str| -> &Map<String, Value> {
            namespaces
                .get("")
                .and_then(|namespace| namespace.get(key))
                .and_then(Value::as_object)
                .unwrap_or(&empty)
        };
        for (key, word) in [("entityTypes", "entity types"), ("actions", "actions")] {
            let count = part(key).len();
            if count > SCHEMA_NAMES_MAX {
                return Err(BundleError::schema(
                    SCHEMA,
                    format!("{count} {word}, at most {SCHEMA_NAMES_MAX} are allowed"),
                ));
            }
        }
        let mut types = Types::new(part("commonTypes"), part("entityTypes"), part("actions"));
        let mut entities = BTreeMap::new();
        for (name, entity) in part("entityTypes") {
            let attributes = types
                .record(entity.get("shape"))
                .map_err(|error| BundleError::schema(SCHEMA, format!("entity {name}: {error}")))?;
            entities.insert(name.clone(), attributes);
        }
        let mut contexts = HashMap::new();
        for (name, action) in part("actions") {
            let context = action
                .get("appliesTo")
                .and_then(|applies| applies.get("context"));
            let context = types
                .record(context)
                .map_err(|error| BundleError::schema(SCHEMA, format!("action {name}: {error}")))?;
            contexts.insert(name.clone(), context);
        }
        Ok(Self {
            types: entities,
            contexts,
        })
    }
}

/// Validates in strict mode, and finds how many steps from entity to entity the policies look; with
/// what the validator found odd.
fn validate(
    validator: &Validator,
    policies: &PolicySet,
) -> Result<(u32, Vec<String>), BundleError> {
    // The fewest steps that do: each of them is gone for every request. What looks further is bounded.
    for level in 1..=LEVEL_MAX {
        let result = validator.validate_with_level(policies, ValidationMode::Strict, level);
        if result.validation_passed() {
            let warnings = result.validation_warnings();
            let odd = warnings.map(|warning| clip(&warning.to_string())).collect();
            return Ok((level, odd));
        }
        if level == LEVEL_MAX {
            return Err(BundleError::schema(
                "policies",
                list(result.validation_errors().map(ToString::to_string)),
            ));
        }
    }
    Err(BundleError::schema("policies", "not validated"))
}

/// The text of each policy by its id; of one made from a template, the template's id and its values.
pub(crate) fn policy_texts(files: &Files) -> Result<BTreeMap<String, String>, BundleError> {
    if !files.keys().any(|path| path.ends_with(".cedar")) {
        return Ok(BTreeMap::new());
    }
    let policies = parse_policies(files)?;
    let text = |policy: &Policy| -> String {
        let Some(template) = policy.template_id() else {
            return policy.to_string();
        };
        let links = policy.template_links().unwrap_or_default();
        let values: BTreeMap<String, String> = links
            .into_iter()
            .map(|(slot, uid)| (slot.to_string(), uid.to_string()))
            .collect();
        let template = policies
            .template(template)
            .map(ToString::to_string)
            .unwrap_or_default();
        format!("{template} {values:?}")
    };
    Ok(policies
        .policies()
        .map(|policy| (id_of(policy.id()).to_owned(), text(policy)))
        .collect())
}

/// The policies that decide, those made from templates written out.
pub(crate) fn static_policies(files: &Files) -> Result<PolicySet, BundleError> {
    let mut written = PolicySet::new();
    for policy in parse_policies(files)?.policies() {
        let refuse = |message: String| {
            BundleError::format(clip(&format!("policy `{}`: {message}", id_of(policy.id()))))
        };
        let written_out = if policy.is_static() {
            policy.clone()
        } else {
            let json = policy.to_json().map_err(|error| refuse(chain(&error)))?;
            Policy::from_json(Some(policy.id().clone()), json)
                .map_err(|error| refuse(chain(&error)))?
        };
        written
            .add(written_out)
            .map_err(|error| refuse(chain(&error)))?;
    }
    Ok(written)
}

/// The engine's library is compiled with extension types, for the prover's sake; bundles have none.
fn check_no_extensions(policies: &PolicySet) -> Result<(), BundleError> {
    let uses = |expr: &Expr| {
        expr.subexpressions()
            .any(|part| matches!(part.expr_kind(), ExprKind::ExtensionFunctionApp { .. }))
    };
    let templates = policies
        .templates()
        .map(|t| (t.id(), t.as_ref().condition()));
    let all = policies
        .policies()
        .map(|p| (p.id(), p.as_ref().condition()));
    match all.chain(templates).find(|(_, condition)| uses(condition)) {
        None => Ok(()),
        Some((id, _)) => Err(BundleError::schema(
            "policies",
            format!("policy `{}`: {NO_EXTENSIONS}", id_of(id)),
        )),
    }
}

const NO_EXTENSIONS: &str =
    "extension types (`ip`, `decimal`, `datetime`, `duration`) are not known here";

/// Types of Cedar's extensions, as a schema names them: by themselves, or as `__cedar::ipaddr`.
const EXTENSIONS: [&str; 4] = ["datetime", "decimal", "duration", "ipaddr"];

/// Whether an extension type stands anywhere in a schema in its resolved form.
fn names_extension(declared: &Value) -> bool {
    match declared {
        Value::Object(map) => {
            let says = |key: &str| map.get(key).and_then(Value::as_str).unwrap_or_default();
            let last = |name: &str| name.rsplit("::").next().unwrap_or_default().to_owned();
            says("type") == "Extension"
                || ["type", "name"]
                    .iter()
                    .any(|key| EXTENSIONS.contains(&last(says(key)).as_str()))
                || map.values().any(names_extension)
        }
        Value::Array(items) => items.iter().any(names_extension),
        _ => false,
    }
}

/// Whether a name in a schema in its resolved form has a control character. What annotations say is no name.
fn names_control_character(declared: &Value) -> bool {
    let has = |text: &str| text.chars().any(char::is_control);
    match declared {
        Value::Object(map) => map
            .iter()
            .filter(|(key, _)| *key != "annotations")
            .any(|(key, value)| has(key) || names_control_character(value)),
        Value::Array(items) => items.iter().any(names_control_character),
        Value::String(text) => has(text),
        _ => false,
    }
}

fn parse_policies(files: &Files) -> Result<PolicySet, BundleError> {
    let mut policies = PolicySet::new();
    let mut ids = BTreeSet::new();
    for path in files
        .keys()
        .filter(|path| path.starts_with(POLICIES_DIR) && path.ends_with(CEDAR))
    {
        let source = text(files, path)?.unwrap_or_default();
        let refuse = |line: usize, message: String| {
            Err(BundleError::Compile {
                file: path.clone(),
                line,
                message: clip(&message),
            })
        };
        let parts = match split_policies(source) {
            Ok(parts) => parts,
            Err(deep) => return refuse(deep.line, deep.message),
        };
        // Every byte of the file passes the engine's own parser, the rest too: a mistake in the
        // splitting can only lead to a refusal, never to a policy that is left out.
        match PolicySet::from_str(parts.rest) {
            Ok(rest) if rest.is_empty() => {}
            Ok(_) => return refuse(parts.rest_line, "a policy without a semicolon".to_owned()),
            Err(error) => return refuse(parts.rest_line, chain(&error)),
        }
        // Counted before the first is parsed.
        if ids.len() + parts.statements.len() > POLICIES_MAX {
            return refuse(1, format!("more than {POLICIES_MAX} policies"));
        }
        let name = path.strip_prefix(POLICIES_DIR).unwrap_or(path);
        for (number, statement) in parts.statements.iter().enumerate() {
            let default = format!("{name}#{}", number + 1);
            let parsed = match Statement::parse(&default, statement.text) {
                Ok(parsed) => parsed,
                Err(message) => return refuse(statement.line, message),
            };
            let id = parsed.annotated_id().unwrap_or(&default).to_owned();
            if !is_policy_id(&id) {
                return refuse(statement.line, format!("@id {POLICY_ID_RULE}"));
            }
            if let Err(error) = parsed.add_to(&mut policies, &id) {
                return refuse(statement.line, error);
            }
            if !ids.insert(id.clone()) {
                return refuse(statement.line, format!("policy id `{id}` stands twice"));
            }
        }
    }
    link(files, &mut policies)?;
    if policies.num_of_policies() == 0 {
        return Err(BundleError::Compile {
            file: "policies".to_owned(),
            line: 0,
            message: "the bundle has no policy".to_owned(),
        });
    }
    Ok(policies)
}

/// A policy, or a template for policies.
enum Statement {
    Policy(Box<Policy>),
    Template(Box<Template>),
}

impl Statement {
    fn parse(id: &str, text: &str) -> Result<Self, String> {
        Policy::parse(Some(PolicyId::new(id)), text)
            .map(|policy| Self::Policy(Box::new(policy)))
            .or_else(|error| {
                // What is neither is a policy with a mistake.
                Template::parse(Some(PolicyId::new(id)), text)
                    .map(|template| Self::Template(Box::new(template)))
                    .map_err(|_| chain(&error))
            })
    }

    fn annotated_id(&self) -> Option<&str> {
        match self {
            Self::Policy(policy) => policy.annotation("id"),
            Self::Template(template) => template.annotation("id"),
        }
    }

    fn add_to(&self, policies: &mut PolicySet, id: &str) -> Result<(), String> {
        let added = match self {
            Self::Policy(policy) => policies.add(policy.new_id(PolicyId::new(id))),
            Self::Template(template) => policies.add_template(template.new_id(PolicyId::new(id))),
        };
        added.map_err(|error| match error {
            cedar_policy::PolicySetError::AlreadyDefined(_) => {
                format!("policy id `{id}` stands twice")
            }
            error => chain(&error),
        })
    }
}

const POLICY_ID_RULE: &str = "must be 1 to 128 bytes without control characters";
const _: () = assert!(POLICY_ID_BYTES_MAX == 128, "the rule says it");

fn is_policy_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= POLICY_ID_BYTES_MAX && !id.chars().any(char::is_control)
}

/// One policy made from a template.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Link {
    id: String,
    template: String,
    principal: Option<LinkedEntity>,
    resource: Option<LinkedEntity>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkedEntity {
    r#type: String,
    id: String,
}

/// Makes the policies that the bundle links from its templates.
fn link(files: &Files, policies: &mut PolicySet) -> Result<(), BundleError> {
    let Some(bytes) = files.get(LINKS) else {
        return Ok(());
    };
    let links: Vec<Link> =
        json::parse_as(bytes).map_err(|error| BundleError::format(format!("{LINKS}: {error}")))?;
    for link in links {
        let refuse = |message: String| {
            BundleError::format(clip(&format!("{LINKS}: link `{}`: {message}", link.id)))
        };
        if !is_policy_id(&link.id) {
            return Err(refuse(format!("its id {POLICY_ID_RULE}")));
        }
        if policies.num_of_policies() == POLICIES_MAX {
            return Err(refuse(format!("more than {POLICIES_MAX} policies")));
        }
        let mut values = HashMap::new();
        for (slot, entity) in [
            (SlotId::principal(), &link.principal),
            (SlotId::resource(), &link.resource),
        ] {
            if let Some(entity) = entity {
                let kind = EntityTypeName::from_str(&entity.r#type)
                    .map_err(|error| refuse(chain(&error)))?;
                values.insert(slot, uid(&kind, &entity.id));
            }
        }
        policies
            .link(
                PolicyId::new(&link.template),
                PolicyId::new(&link.id),
                values,
            )
            .map_err(|error| refuse(chain(&error)))?;
    }
    Ok(())
}

fn parse_entities(files: &Files, schema: &Schema) -> Result<Entities, BundleError> {
    let value = match files.get(ENTITIES) {
        None => Value::Array(Vec::new()),
        Some(bytes) => json::parse(bytes)
            .map_err(|error| BundleError::format(format!("{ENTITIES}: {error}")))?,
    };
    let count = value.as_array().map_or(0, Vec::len);
    if count > ENTITIES_MAX {
        return Err(BundleError::format(format!(
            "{ENTITIES}: {count} entities, at most {ENTITIES_MAX} are allowed"
        )));
    }
    check_ancestors(&value)?;
    Entities::from_json_value(value, Some(schema))
        .map_err(|error| BundleError::schema(ENTITIES, chain(&error)))
}

/// Counts the pairs of entity and ancestor before the compiler builds them all.
fn check_ancestors(entities: &Value) -> Result<(), BundleError> {
    // `{"type", "id"}`, or the same inside `__entity`.
    fn name(uid: &Value) -> Option<(&str, &str)> {
        let uid = uid.get("__entity").unwrap_or(uid);
        Some((uid.get("type")?.as_str()?, uid.get("id")?.as_str()?))
    }
    let mut parents: HashMap<(&str, &str), Vec<(&str, &str)>> = HashMap::new();
    for entity in entities.as_array().into_iter().flatten() {
        if let Some(uid) = entity.get("uid").and_then(name) {
            let listed = entity.get("parents").and_then(Value::as_array);
            parents.insert(uid, listed.into_iter().flatten().filter_map(name).collect());
        }
    }
    let mut total = 0_usize;
    for uid in parents.keys() {
        let mut seen = HashSet::new();
        let mut pending = vec![*uid];
        while let Some(next) = pending.pop() {
            for parent in parents.get(&next).into_iter().flatten() {
                if seen.insert(*parent) {
                    pending.push(*parent);
                    total += 1;
                }
            }
            if total > ANCESTORS_MAX {
                return Err(BundleError::format(format!(
                    "{ENTITIES}: more than {ANCESTORS_MAX} pairs of entity and ancestor: make the \
                     hierarchy flatter"
                )));
            }
        }
    }
    Ok(())
}

/// For each entity, the entities of the bundle that its attributes and tags refer to.
fn references(entities: &Entities) -> HashMap<EntityUid, Vec<EntityUid>> {
    let mut references = HashMap::new();
    for entity in entities.iter() {
        let mut found = BTreeSet::new();
        let values = entity.attrs().chain(entity.tags());
        for value in values.filter_map(|(_, value)| value.ok()) {
            collect_uids(&value, &mut found);
        }
        found.retain(|uid| entities.get(uid).is_some());
        if !found.is_empty() {
            references.insert(entity.uid(), found.into_iter().collect());
        }
    }
    references
}

/// INV-07: refuses a bundle in which one entity brings more than its share into a request.
fn check_reach(
    references: &HashMap<EntityUid, Vec<EntityUid>>,
    level: u32,
) -> Result<(), BundleError> {
    for uid in references.keys() {
        let mut reached = HashSet::from([uid]);
        let mut next = vec![uid];
        for _ in 1..level {
            let mut beyond = Vec::new();
            for found in next.iter().filter_map(|uid| references.get(*uid)).flatten() {
                if reached.insert(found) {
                    beyond.push(found);
                }
                if reached.len() > REACHED_FROM_ONE_MAX {
                    return Err(BundleError::format(clip(&format!(
                        "{ENTITIES}: {uid} reaches more than {REACHED_FROM_ONE_MAX} entities in the \
                         {level} steps that the policies look: make entities that belong together \
                         members of one (`parents`), and ask with `in`"
                    ))));
                }
            }
            next = beyond;
        }
    }
    Ok(())
}

fn collect_uids(value: &EvalResult, found: &mut BTreeSet<EntityUid>) {
    match value {
        EvalResult::EntityUid(uid) => _ = found.insert(uid.clone()),
        EvalResult::Set(set) => set.iter().for_each(|item| collect_uids(item, found)),
        EvalResult::Record(record) => {
            record
                .iter()
                .for_each(|(_, item)| collect_uids(item, found));
        }
        _ => {}
    }
}

/// The actions that requests may name: those that the schema applies to something.
fn actions(
    schema: &Schema,
    declared: &Declared,
    entities: &Entities,
) -> Result<HashMap<String, Action>, BundleError> {
    let mut actions = HashMap::new();
    for env in schema.request_envs() {
        let uid = env.action();
        let name = uid.id().unescaped();
        if actions.contains_key(name) {
            continue;
        }
        let Some(entity) = entities.get(uid) else {
            continue;
        };
        if uid.type_name().to_string() != ACTION {
            return Err(BundleError::schema(
                SCHEMA,
                format!("action {uid} is in a namespace"),
            ));
        }
        let action = Action {
            entity: entity.clone(),
            uid: uid.clone(),
            context: declared.contexts.get(name).cloned().unwrap_or_default(),
        };
        actions.insert(name.to_owned(), action);
    }
    Ok(actions)
}

/// The Cedar context: the request's own, and its parameters where the schema declares them.
fn context(
    request: &PolicyRequest,
    declared: &RecordType,
    mentioned: &mut Vec<EntityUid>,
) -> Result<Context, String> {
    let nothing = Map::new();
    let own = match &request.context {
        Value::Null => &nothing,
        Value::Object(map) => map,
        _ => return Err("must be an object".to_owned()),
    };
    // Whoever sent the context must not choose what policies take for the parameters.
    if own.contains_key("params") {
        return Err("must not contain `params`".to_owned());
    }
    let key = "params".to_owned();
    let none = Value::Object(Map::new());
    let params = match &request.params {
        Value::Null => &none,
        params => params,
    };
    let params = declared.declares(&key).then_some((&key, params));
    let values = declared.read(own.iter().chain(params), mentioned)?;
    Context::from_pairs(values).map_err(|error| chain(&error))
}

fn uid(kind: &EntityTypeName, id: &str) -> EntityUid {
    EntityUid::from_type_name_and_id(kind.clone(), EntityId::new(id))
}

fn id_of(id: &PolicyId) -> &str {
    id.as_ref()
}

fn text<'a>(files: &'a Files, path: &str) -> Result<Option<&'a str>, BundleError> {
    files
        .get(path)
        .map(|bytes| {
            std::str::from_utf8(bytes)
                .map_err(|_| BundleError::format(format!("`{path}` is not UTF-8")))
        })
        .transpose()
}

fn list(messages: impl Iterator<Item = String>) -> String {
    let all: Vec<String> = messages.collect();
    let mut shown: Vec<String> = all.iter().take(FAILURES_LISTED_MAX).cloned().collect();
    shown.sort_unstable();
    let mut text = shown.join("; ").replace('\n', " ");
    if all.len() > shown.len() {
        text.push_str(&format!("; and {} more", all.len() - shown.len()));
    }
    text
}
