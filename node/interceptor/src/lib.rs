//! Action to decision to permit: the only maker of permits
