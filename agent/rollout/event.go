package rollout

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// Event is something that people should see at the Node, in `kubectl describe node`.
type Event struct {
	// Name is that of the object that says it already; empty for a new one.
	Name string
	// Reason is one of a few words: TuneDrift.
	Reason, Message string
	Warning         bool
	// Count is how often it was seen, First and Last when.
	Count       int
	First, Last time.Time
}

const (
	// apart is the least time between two Events of a reason with other words, and again
	// that between two counts of the same. There are ten reasons.
	apart = time.Minute
	again = 10 * time.Minute
	// longest is less than what an Event's message may have, 1,024 bytes
	// (https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/).
	longest = 1000
)

// teller tells Events and logs them, and neither again and again.
type teller struct {
	say func(context.Context, Event) (name string, err error)
	log *slog.Logger
	now func() time.Time
	// told is what was said last, by reason; silent how often nothing was said since.
	told   map[string]*Event
	wrote  map[string]time.Time
	silent map[string]int
}

func newTeller(say func(context.Context, Event) (string, error), log *slog.Logger, now func() time.Time) *teller {
	return &teller{say: say, log: log, now: now, told: map[string]*Event{}, wrote: map[string]time.Time{}, silent: map[string]int{}}
}

// tell the lines of a reason, as one Event.
func (t *teller) tell(ctx context.Context, reason string, warning bool, lines ...string) {
	if len(lines) == 0 {
		return
	}
	message := lines[0]
	if more := len(lines) - 1; more > 0 {
		message = fmt.Sprintf("%s (and %d more)", message, more)
	}
	if len(message) > longest {
		message = message[:longest]
	}
	now := t.now()
	e := t.told[reason]
	if e != nil && e.Message == message {
		e.Count, e.Last = e.Count+1, now
		if now.Sub(t.wrote[reason]) < again {
			return
		}
		t.write(ctx, e)
		return
	}
	if e != nil && now.Sub(t.wrote[reason]) < apart {
		t.silent[reason] += len(lines)
		return
	}
	if n := t.silent[reason]; n > 0 {
		t.log.Info("not told one by one", "reason", reason, "more", n)
		t.silent[reason] = 0
	}
	for _, line := range lines {
		if warning {
			t.log.Warn(line, "reason", reason)
		} else {
			t.log.Info(line, "reason", reason)
		}
	}
	t.told[reason] = &Event{Reason: reason, Message: message, Warning: warning, Count: 1, First: now, Last: now}
	t.write(ctx, t.told[reason])
}

// over says that what was told is no more, so that the next time it is new.
func (t *teller) over(reason string) { delete(t.told, reason) }

func (t *teller) write(ctx context.Context, e *Event) {
	t.wrote[e.Reason] = t.now()
	if t.say == nil {
		return
	}
	name, err := t.say(ctx, *e)
	if err != nil {
		t.log.Error("write Event", "reason", e.Reason, "error", err)
		return
	}
	e.Name = name
}
