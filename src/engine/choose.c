/*
 * Which engines this build has, and which of them runs the machine.
 */
#include "engine/engine.h"

#include "host/log.h"

#include <errno.h>
#include <string.h>

const struct engine_ops *const engines[] = {&engine_kvm, &engine_bt, &engine_interp, NULL};

/* What --engine may name, here or in another build. */
static const char *const known[] = {"auto", "kvm", "bt", "interp"};

static bool is_known(const char *name, size_t len)
{
    for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
        if (strlen(known[i]) == len && !memcmp(known[i], name, len))
            return true;
    }
    return false;
}

/* Whether it is there; and, since /dev/kvm on its own promises little, whether it works. */
static int try(const struct engine_ops *engine, struct error *err)
{
    int ret = engine->probe(err);

    return ret || !engine->trial ? ret : engine->trial(err);
}

/* Those that were passed over are told of, unless there is simply no such thing on this host. */
static const struct engine_ops *choose_auto(struct error *err)
{
    for (size_t i = 0; engines[i]; i++) {
        int ret = try(engines[i], err);

        if (!ret) {
            log_debug("engine %s", engines[i]->name);
            *err = (struct error){0};
            return engines[i];
        }
        log_message(ret == -ENOENT ? LOG_DEBUG : LOG_INFO, "engine %s can't run here: %s",
                    engines[i]->name, err->text);
    }
    return NULL;
}

const struct engine_ops *engine_choose(const char *name, bool *verify, struct error *err)
{
    size_t len = strcspn(name, ",");

    *verify = false;
    if (!is_known(name, len) || (name[len] && strcmp(name + len, ",verify"))) {
        error_input(err, "no engine '%s': give auto, kvm, bt or interp", name);
        return NULL;
    }
    if (name[len] && (len != 2 || memcmp(name, "bt", 2))) {
        error_input(err, "%s: only the engine bt can verify itself: give bt,verify", name);
        return NULL;
    }
    *verify = name[len];
    if (!strcmp(name, "auto"))
        return choose_auto(err);
    for (size_t i = 0; engines[i]; i++) {
        if (strlen(engines[i]->name) == len && !memcmp(engines[i]->name, name, len))
            return engines[i]->probe(err) ? NULL : engines[i];
    }
    error_input(err, "this build has no engine %s: give auto, kvm or interp", name);
    return NULL;
}
