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
	owner  *holding
	other  string // another pod that used it, the last one
	place  *list.Element
}

// holding is what is kept for one pod, as a rule what it was the first to ask for.
type holding struct {
	pod    string
	bytes  int
	recent *list.List // of *entry, the last used in front
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

// cache keeps answers up to a number of bytes. Where there is no room, the pod that holds
// the most gives up what was used the longest ago, to another one that has used it and holds
// less, or for good: who asks for very much pushes out what nobody else wants.
type cache struct {
	mu      sync.Mutex
	most    int
	bytes   int
	entries map[key]*entry
	pods    map[string]*holding // none that is empty
}

// nobody holds what no pod has asked for: what an earlier agent has learned.
const nobody = ""

func newCache(most int) *cache {
	return &cache{most: most, entries: map[key]*entry{}, pods: map[string]*holding{}}
}

// get finds what is known of a key, and notes that a pod has used it.
func (c *cache) get(k key, pod string, now time.Time) found {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[k]; e != nil {
		e.owner.recent.MoveToFront(e.place)
		if pod != e.owner.pod {
			e.other = pod
		}
	}
	return c.find(k, now)
}

// peek is get for who is not a pod.
func (c *cache) peek(k key, now time.Time) found {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.find(k, now)
}

func (c *cache) find(k key, now time.Time) found {
	e := c.entries[k]
	if e == nil {
		return found{}
	}
	f := found{message: e.message, rcode: e.rcode, age: now.Sub(e.stored), ttl: e.ttl, failed: e.failed}
	f.left = e.ttl - f.age
	return f
}

// put keeps an answer with its message, for a pod if it is nobody's yet. One that must not
// be kept takes the place of an older one all the same.
func (c *cache) put(k key, pod string, a *answer, packed []byte, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	other := nobody
	if e := c.entries[k]; e != nil {
		pod, other = e.owner.pod, e.other
		c.drop(e)
	}
	if a.ttl > 0 {
		c.add(&entry{key: k, owner: c.holding(pod), other: other, message: packed, rcode: a.rcode, stored: now, ttl: a.ttl})
	}
}

// fail notes that a key could not be had, which a pod has asked for.
func (c *cache) fail(k key, pod string, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[k]
	if e == nil {
		e = &entry{key: k, owner: c.holding(pod)}
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

func (c *cache) holding(pod string) *holding {
	if h := c.pods[pod]; h != nil {
		return h
	}
	return &holding{pod: pod, recent: list.New()}
}

// add keeps an entry for its owner, and makes room.
func (c *cache) add(e *entry) {
	c.place(e)
	for c.bytes > c.most && len(c.entries) > 1 {
		from := c.largest()
		e := from.recent.Back().Value.(*entry)
		heir := c.holding(e.other)
		c.drop(e)
		if e.other != nobody && heir.bytes+e.size() < from.bytes {
			e.owner, e.other = heir, from.pod
			c.place(e)
		}
	}
}

func (c *cache) place(e *entry) {
	c.pods[e.owner.pod] = e.owner
	e.place = e.owner.recent.PushFront(e)
	c.entries[e.key] = e
	e.owner.bytes += e.size()
	c.bytes += e.size()
}

// largest is the holding of most bytes.
func (c *cache) largest() (largest *holding) {
	for _, h := range c.pods {
		if largest == nil || h.bytes > largest.bytes {
			largest = h
		}
	}
	return largest
}

func (c *cache) drop(e *entry) {
	e.owner.recent.Remove(e.place)
	if e.owner.bytes -= e.size(); e.owner.bytes == 0 {
		delete(c.pods, e.owner.pod)
	}
	delete(c.entries, e.key)
	c.bytes -= e.size()
}

// usage is how many answers there are, and the memory they take.
func (c *cache) usage() (entries, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries), c.bytes
}
