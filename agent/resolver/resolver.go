package resolver

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"

	"github.com/millrace/millrace/model"
)

const (
	// staleAfter is how long a server is waited for where there is a stale answer (RFC 8767,
	// 5: the client response timer).
	staleAfter = 1800 * time.Millisecond
	// backAfter is how long it is waited for else: a client that waits for 5 s (resolv.conf(5))
	// has still time for the cluster's DNS servers then.
	backAfter = 2 * time.Second
)

// Settings are what a Resolver needs. Zone must be set.
type Settings struct {
	// Zone is the cluster's domain, in lower case, without a final dot.
	Zone string
	// Heard says when the source last knew the cluster; nil is always now. DenyFor after
	// that it is not said any more that a name of the cluster does not exist, SayFor after
	// that nothing of the cluster at all.
	Heard           func() time.Time
	DenyFor, SayFor time.Duration
	// Service is in front of the cluster's DNS servers. As long as none of them is ready, what
	// is known is said all the same.
	Service model.Name
	// Sink is told what is learned of names outside the cluster; nil for nobody.
	Sink Sink
	// Log gets what goes wrong, and each query at the level of debugging; nil for nothing.
	Log *slog.Logger
	// Control is called for each socket by which a server is asked over UDP, before it is
	// connected (net.Dialer); nil for nothing.
	Control func(network, address string, c syscall.RawConn) error
	// Roots vouch for the certificates of DNS over TLS; nil for those of the machine.
	Roots *x509.CertPool
}

// Resolver answers what the kernel does not. Its methods may be called at once by many.
type Resolver struct {
	settings Settings
	zone     string // with the final dot
	log      *slog.Logger
	cache    *cache
	limits   limits
	counts   [sources]atomic.Uint64
	spoken   spoken
	history  history
	now      func() time.Time

	config   atomic.Pointer[config]
	snapshot atomic.Pointer[snapshot]

	ctx   context.Context // ends with Close
	close context.CancelFunc
	lead  chan string // names to be told to the sink

	mu      sync.Mutex // guards what follows, and that the cache has answers of config alone
	dns     *model.DNS
	servers map[model.Upstream]*server
	flights map[key]*flight
	files   map[string]named // by path, of those that dns names
	early   int              // of flights: those that were begun before anybody waited
}

// flight is a question that servers are being asked.
type flight struct {
	pod   string // that began it
	early bool   // begun before anybody waited
	done  chan struct{}
	found found // what came of it, once done is closed
	err   error
}

// New makes a Resolver. It hands everything back until it is configured.
func New(settings Settings) *Resolver {
	if settings.Log == nil {
		settings.Log = slog.New(slog.DiscardHandler)
	}
	r := &Resolver{
		settings: settings, zone: dns.Fqdn(settings.Zone), log: settings.Log,
		cache: newCache(cacheBytes), limits: limits{pods: map[string]*share{}}, lead: make(chan string, leadMost),
		now: time.Now, servers: map[model.Upstream]*server{}, flights: map[key]*flight{}, files: map[string]named{},
	}
	r.ctx, r.close = context.WithCancel(context.Background())
	return r
}

// Close ends all that the Resolver has begun.
func (r *Resolver) Close() {
	r.close()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.servers {
		s.close()
	}
}

// Take makes a Snapshot the one that is answered from, and its DNS the configuration.
func (r *Resolver) Take(s *model.Snapshot) {
	r.snapshot.Store(newSnapshot(s, r.settings.Service))
	r.Configure(s.DNS)
}

// Resolve answers a message that a pod has sent over UDP; from says which pod, for its
// limits. With ok false the message is for the cluster's DNS servers to answer. It returns
// after 2 s at the latest.
func (r *Resolver) Resolve(ctx context.Context, from string, message []byte) (reply []byte, ok bool) {
	q, ok := read(message)
	if !ok {
		r.counts[NotPlain].Add(1)
		return nil, false
	}
	begun := r.now()
	m, source := r.answer(ctx, from, &q, begun)
	if m != nil {
		var err error
		if reply, err = q.reply(m); err != nil {
			source = HandedBack
		}
	}
	r.counts[source].Add(1)
	r.tell(from, &q, m, source, begun)
	return reply, reply != nil
}

// answer says what is known and where from; nil for what is handed back.
func (r *Resolver) answer(ctx context.Context, from string, q *query, now time.Time) (*dns.Msg, Source) {
	c := r.config.Load()
	if c == nil {
		return nil, HandedBack
	}
	if !r.limits.enter(from, now) {
		return nil, Refused
	}
	if r.ours(q.name) {
		return r.cluster(ctx, from, c, q, now)
	}
	if !q.recursive {
		return nil, HandedBack
	}
	return r.outside(ctx, from, c, q.name, q.kind, now)
}

// outside answers for a name that is not the cluster's.
func (r *Resolver) outside(ctx context.Context, from string, c *config, name string, kind uint16, now time.Time) (*dns.Msg, Source) {
	to := c.forward(name)
	if to == nil || len(to.servers) == 0 {
		return nil, HandedBack
	}
	k := key{name, kind}
	have := r.cache.get(k, from, now)
	switch {
	case have.fresh():
		if have.soon() && !have.resting(now) {
			r.fetchEarly(c, to, k)
		} else {
			r.pair(c, to, k, from, now)
		}
		return given(have, Cache)
	case have.resting(now) && have.usable():
		r.lesson(k)
		return given(have, Stale)
	case have.resting(now):
		return nil, HandedBack
	}
	done, ok := r.limits.wait(from, now)
	if !ok {
		return nil, Refused
	}
	defer done()
	f := r.fetch(c, to, k, from)
	if f == nil {
		return nil, Refused
	}
	r.pair(c, to, k, from, now)
	patience := backAfter
	if have.usable() {
		patience = staleAfter
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-f.done:
		if f.err == nil {
			return given(f.found, Upstream)
		}
	case <-late.C:
		r.cache.fail(k, from, r.now()) // who asks next need not wait; whatever is said yet counts
	case <-ctx.Done():
		return nil, HandedBack
	}
	if have.usable() {
		r.lesson(k)
		return given(have, Stale)
	}
	return nil, HandedBack
}

// given is what was found, as a message.
func given(f found, source Source) (*dns.Msg, Source) {
	m, err := f.unpack()
	if err != nil {
		return nil, HandedBack
	}
	return m, source
}

// pair asks for the other family as well where the kernel is to learn both.
func (r *Resolver) pair(c *config, to *forward, k key, pod string, now time.Time) {
	other, ok := k.other()
	if r.settings.Sink == nil || !ok {
		return
	}
	if have := r.cache.peek(other, now); !have.fresh() && !have.resting(now) {
		r.fetch(c, to, other, pod)
	}
}

// other is the same name's other family; false for other types.
func (k key) other() (key, bool) {
	switch k.kind {
	case dns.TypeA:
		return key{k.name, dns.TypeAAAA}, true
	case dns.TypeAAAA:
		return key{k.name, dns.TypeA}, true
	}
	return k, false
}

var errOld = errors.New("the servers to be asked are others now")

// fetch asks servers for a pod, or joins who is asking them already; nil if too many are.
func (r *Resolver) fetch(c *config, to *forward, k key, pod string) *flight {
	return r.begin(c, to, k, &flight{pod: pod})
}

// fetchEarly asks servers for what pods will ask for, if not too much is asked for so; what
// pods wait for has room of its own.
func (r *Resolver) fetchEarly(c *config, to *forward, k key) {
	r.begin(c, to, k, &flight{pod: nobody, early: true})
}

func (r *Resolver) begin(c *config, to *forward, k key, f *flight) *flight {
	r.mu.Lock()
	defer r.mu.Unlock()
	if has := r.flights[k]; has != nil {
		return has
	}
	if f.early && r.early >= earlyWaiting || !f.early && len(r.flights)-r.early >= allWaiting {
		return nil
	}
	f.done = make(chan struct{})
	r.flights[k] = f
	if f.early {
		r.early++
	}
	go r.fly(c, to, k, f)
	return f
}

func (r *Resolver) fly(c *config, to *forward, k key, f *flight) {
	a, err := to.servers.ask(r.ctx, k.name, k.kind)
	now := r.now()
	r.mu.Lock()
	if !sameServers(to, r.config.Load().forward(k.name)) {
		err = errOld
	}
	switch {
	case err == nil:
		if f.found.message, err = a.pack(k); err == nil {
			f.found.rcode, f.found.ttl, f.found.left = a.rcode, a.ttl, max(a.ttl, 1)
			r.cache.put(k, f.pod, a, f.found.message, now)
		}
	case !errors.Is(err, errOld) && r.ctx.Err() == nil:
		r.cache.fail(k, f.pod, now)
	}
	f.err = err
	delete(r.flights, k)
	if f.early {
		r.early--
	}
	r.mu.Unlock()
	close(f.done)
	if err != nil {
		r.log.Debug("resolve", "name", k.name, "type", dns.Type(k.kind).String(), "error", err)
		return
	}
	r.lesson(k)
}

// config is whom to ask.
type config struct {
	ttl      time.Duration
	left     string
	reverse  bool
	forwards []forward
	// dns has the table of the cluster's DNS servers.
	dns *model.DNS
}

// tabled says whether the cluster's DNS servers have a name in a table of their own.
func (c *config) tabled(name string) bool { return c.dns.HasHost(strings.TrimSuffix(name, ".")) }

// forward is a zone and whom to ask for it; none if it is left to others.
type forward struct {
	zone    string
	servers servers
}

// forward finds whom to ask for a name: zones are in the order of their length. For one that
// the cluster's DNS servers have in a table nobody is.
func (c *config) forward(name string) *forward {
	if c == nil || c.tabled(name) {
		return nil
	}
	for i := range c.forwards {
		if below(name, c.forwards[i].zone) {
			return &c.forwards[i]
		}
	}
	return nil
}

// Configure says how the cluster's DNS servers are configured, as far as it is known: what
// they would ask others, the Resolver does. What has been kept of names whose servers are
// others now is forgotten. With nil everything is handed back.
func (r *Resolver) Configure(d *model.DNS) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if reflect.DeepEqual(d, r.dns) {
		return
	}
	r.dns = d
	r.arrange()
}

// arrange makes the configuration of r.dns and the files that it names; r.mu is held.
func (r *Resolver) arrange() {
	c, wanted := r.wanted()
	before := r.config.Load()
	if c == nil && before == nil || c != nil && before != nil && c.same(before) {
		return
	}
	for to, s := range r.servers {
		if !wanted[to] {
			s.close()
			delete(r.servers, to)
		}
	}
	if c != nil {
		for i := range c.forwards {
			for j, s := range c.forwards[i].servers {
				if r.servers[s.to] == nil {
					r.servers[s.to] = s
				}
				c.forwards[i].servers[j] = r.servers[s.to]
			}
		}
	}
	r.config.Store(c)
	r.cache.forget(others(before, c))
	r.forget(others(before, c))
}

// others says of names whether other servers are asked for them than before. What an earlier
// agent learned before there was a configuration goes on, unless nobody is asked now.
func others(before, now *config) func(name string) bool {
	if before == nil {
		return func(name string) bool { return sameServers(nil, now.forward(name)) }
	}
	return func(name string) bool { return !sameServers(before.forward(name), now.forward(name)) }
}

// settled is the configuration, once all that was learned by another one is forgotten.
func (r *Resolver) settled() *config {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.config.Load()
}

// wanted is the configuration with servers of its own, and which those are.
func (r *Resolver) wanted() (*config, map[model.Upstream]bool) {
	all := map[model.Upstream]bool{}
	if r.dns == nil {
		return nil, all
	}
	c := &config{ttl: r.dns.TTL, left: r.dns.Left, reverse: r.dns.Reverse, dns: r.dns}
	if zone := r.dns.Zone; zone != "" && zone != r.settings.Zone {
		c.left = "the cluster's zone is " + zone
	}
	for _, from := range r.dns.Forwards {
		to := forward{zone: strings.ToLower(dns.Fqdn(from.Zone))}
		for _, upstream := range r.expanded(from) {
			all[upstream] = true
			to.servers = append(to.servers, r.newServer(upstream))
		}
		c.forwards = append(c.forwards, to)
	}
	return c, all
}

// expanded are the servers of a zone, those of files one by one; none if it is left to
// others. Those of a file that cannot be read, or names none for now, are those that it
// named before.
func (r *Resolver) expanded(from model.Forward) (all []model.Upstream) {
	if from.Left != "" {
		return nil
	}
	for _, upstream := range from.To {
		if upstream.File == "" {
			all = append(all, upstream)
			continue
		}
		for _, addr := range r.listed(upstream.File) {
			all = append(all, model.Upstream{Address: addr, ServerName: upstream.ServerName, TCP: upstream.TCP})
		}
	}
	return all
}

// named is what a file named when it could be read last, and why it cannot be read now.
type named struct {
	servers []netip.AddrPort
	wrong   string
}

// listed are the servers that a file names, or named before something went wrong with it:
// who writes it may not have done so at once. What is wrong is said once; r.mu is held.
func (r *Resolver) listed(file string) []netip.AddrPort {
	have := r.files[file]
	servers, err := listed(file)
	switch {
	case err == nil:
		have = named{servers: servers}
	case err.Error() == have.wrong:
	case len(have.servers) > 0:
		r.log.Warn("the DNS servers that were known before are asked", "servers", have.servers, "error", err)
		have.wrong = err.Error()
	default:
		r.log.Warn("names outside the cluster are left to the cluster's DNS servers", "error", err)
		have.wrong = err.Error()
	}
	r.files[file] = have
	return have.servers
}

// same says whether two configurations are.
func (c *config) same(other *config) bool {
	return c.ttl == other.ttl && c.left == other.left && c.reverse == other.reverse &&
		slices.Equal(c.dns.Hosts, other.dns.Hosts) && slices.Equal(c.dns.HostAddresses, other.dns.HostAddresses) &&
		slices.EqualFunc(c.forwards, other.forwards, func(a, b forward) bool { return a.zone == b.zone && sameServers(&a, &b) })
}

// sameServers says whether the same servers are asked, or none.
func sameServers(a, b *forward) bool {
	var of, as servers
	if a != nil {
		of = a.servers
	}
	if b != nil {
		as = b.servers
	}
	return slices.EqualFunc(of, as, func(a, b *server) bool { return a.to == b.to })
}
