package resolver

import (
	"container/list"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// cacheBytes is the memory that answers may take: about 50,000 names.
	cacheBytes = 16 << 20
	// entryBytes is what an entry takes beside its name and message.
	entryBytes = 256
	// staleMost is how long after their TTL answers are kept (RFC 8767, 5: 1 to 3 days).
	staleMost = 24 * time.Hour
	// recalledMost is how long what an earlier agent has learned is kept: how old it is is not
	// known any more, nor whom that agent asked.
	recalledMost = time.Hour
	// staleTTL is what a stale answer is given with (RFC 8767, 5).
	staleTTL = 30 * time.Second
	// recheck is how long after a failure nothing is asked for a name, and what is stale is
	// given at once. RFC 9520, 3.2 has 1 s to 5 minutes.
	recheck = 5 * time.Second
	// soonShare is what is left of an answer's time when it is asked for anew (unbound's
	// `prefetch` has the same tenth), and soonLeast what is left at least.
	soonShare = 10
	soonLeast = time.Second
	// soonFrom is the shortest TTL of what is asked for before its time is over: others are
	// asked for when a pod asks, or servers would be asked for them all the time.
	soonFrom = 10 * time.Second
)

// key says what was asked. That a name does not exist is kept for the type that was asked
// for alone, as CoreDNS' plugin cache does: there are load balancers that know addresses of
// one family, and say of the other that there is no such name (RFC 4074, 4.2).
type key struct {
	name string
	kind uint16
}

// entry is what is known of a key. Its fields are guarded by the cache's lock; message is
// never written to.
type entry struct {
	key key
	// message is the answer, packed; nil if only that it could not be had is known.
	message []byte
	rcode   int
	stored  time.Time
	ttl     time.Duration
	// failed is when it could not be had last.
	failed time.Time
	place  *list.Element
}

func (e *entry) size() int { return len(e.key.name) + len(e.message) + entryBytes }

// found is an entry as it was when it was looked for.
type found struct {
	message []byte
	rcode   int
	age     time.Duration
	// left is how long it is good; negative for how long it has been stale.
	left, ttl time.Duration
	failed    time.Time
}

// usable says whether there is an answer, which may be stale.
func (f *found) usable() bool { return f.message != nil && f.left > -staleMost }

func (f *found) fresh() bool { return f.message != nil && f.left > 0 }

// soon says that it is time to ask anew, so that nobody has to wait.
func (f *found) soon() bool { return f.ttl >= soonFrom && f.left < max(f.ttl/soonShare, soonLeast) }

// failing says that the last time it was asked for it could not be had.
func (f *found) failing() bool { return !f.failed.IsZero() }

// resting says that asking has just failed.
func (f *found) resting(now time.Time) bool { return now.Before(f.failed.Add(recheck)) }

// unpack is the answer as it is to be given now.
func (f *found) unpack() (*dns.Msg, error) {
	m := &dns.Msg{}
	if err := m.Unpack(f.message); err != nil {
		return nil, err
	}
	pass(m, f.age, f.left <= 0)
	return m, nil
}

// cache keeps answers, those that were used last, up to a number of bytes.
type cache struct {
	mu      sync.Mutex
	most    int
	bytes   int
	entries map[key]*entry
	recent  *list.List // of *entry, the last used in front
}

func newCache(most int) *cache {
	return &cache{most: most, entries: map[key]*entry{}, recent: list.New()}
}

// get finds what is known of a key, and notes that it was used.
func (c *cache) get(k key, now time.Time) found { return c.find(k, now, true) }

// peek is get for who is not a pod.
func (c *cache) peek(k key, now time.Time) found { return c.find(k, now, false) }

func (c *cache) find(k key, now time.Time, used bool) found {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[k]
	if e == nil {
		return found{}
	}
	if used {
		c.recent.MoveToFront(e.place)
	}
	f := found{message: e.message, rcode: e.rcode, age: now.Sub(e.stored), ttl: e.ttl, failed: e.failed}
	f.left = e.ttl - f.age
	return f
}

// put keeps an answer with its message. One that must not be kept takes the place of an
// older one all the same.
func (c *cache) put(k key, a *answer, packed []byte, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(c.entries[k])
	if a.ttl > 0 {
		c.add(&entry{key: k, message: packed, rcode: a.rcode, stored: now, ttl: a.ttl})
	}
}

// fail notes that a key could not be had.
func (c *cache) fail(k key, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[k]
	if e == nil {
		e = &entry{key: k}
		c.add(e)
	}
	e.failed = now
}

// forget forgets names.
func (c *cache) forget(which func(name string) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, e := range c.entries {
		if which(k.name) {
			c.drop(e)
		}
	}
}

func (c *cache) add(e *entry) {
	e.place = c.recent.PushFront(e)
	c.entries[e.key] = e
	for c.bytes += e.size(); c.bytes > c.most && c.recent.Len() > 1; {
		c.drop(c.recent.Back().Value.(*entry))
	}
}

func (c *cache) drop(e *entry) {
	if e != nil {
		c.recent.Remove(e.place)
		delete(c.entries, e.key)
		c.bytes -= e.size()
	}
}

// usage is how many answers there are, and the memory they take.
func (c *cache) usage() (entries, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries), c.bytes
}
