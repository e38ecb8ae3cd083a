/*
 * Which engines this build has, and which of them runs the machine.
 */
#include "engine/engine.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
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

/* ",verify" and ",seed=N", in this order. */
static bool parse_checks(const char *text, struct engine_checks *checks)
{
    static const char verify[] = ",verify", seed[] = ",seed=";

    if (!strncmp(text, verify, strlen(verify))) {
        checks->verify = true;
        text += strlen(verify);
    }
    if (!strncmp(text, seed, strlen(seed))) {
        char *end;

        text += strlen(seed);
        if (*text < '0' || *text > '9')
            return false;
        errno = 0;
        checks->seed = strtoull(text, &end, 10);
        if (errno)
            return false;
        text = end;
    }
    return !*text;
}

const struct engine_ops *engine_choose(const char *name, struct engine_checks *checks,
                                       struct error *err)
{
    size_t len = strcspn(name, ",");

    *checks = (struct engine_checks){0};
    if (!is_known(name, len) || !parse_checks(name + len, checks)) {
        error_input(err, "no engine '%s': give auto, kvm, bt or interp", name);
        return NULL;
    }
    if (name[len] && (len != 2 || memcmp(name, "bt", 2))) {
        error_input(err, "%s: only the engine bt can verify itself: give bt,verify", name);
        return NULL;
    }
    if (!strcmp(name, "auto"))
        return choose_auto(err);
    for (size_t i = 0; engines[i]; i++) {
        if (strlen(engines[i]->name) == len && !memcmp(engines[i]->name, name, len))
            return engines[i]->probe(err) ? NULL : engines[i];
    }
    error_input(err, "this build has no engine %s: give auto, kvm or interp", name);
    return NULL;
}
