package corefile

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/millrace/millrace/model"
)

const (
	// etcHosts is the file of plugin hosts if none is named; kubelet writes it for each pod
	// that has a network of its own.
	etcHosts = "/etc/hosts"
	// mostHosts is how much of hosts tables is read, in bytes: a ConfigMap has 1 MiB at most.
	mostHosts = 8 << 20
)

// table is what the plugin hosts answers from (https://coredns.io/plugins/hosts/).
type table struct {
	// names are in lower case, without a final dot; "*" for a first label is any.
	names     []string
	addresses []netip.Addr
	// through are the zones in which others are asked for what is not in it.
	through []string
}

// readTables reads what the plugins hosts of servers answer from. Where it cannot be known
// the directive says why.
func readTables(servers []*server, files *Files) error {
	room := mostHosts
	for _, s := range servers {
		var of *directive
		for i := range s.directives {
			d := &s.directives[i]
			if d.name != "hosts" {
				continue
			}
			if of != nil {
				return mistake(d.at, "hosts is there twice")
			}
			of = d
			if d.table, d.untabled = files.table(d, &room); d.table == nil {
				continue
			}
			d.table.keep(d, s, servers)
		}
	}
	return nil
}

// table reads the inline entries of a directive hosts, and its file; nil where that is not
// known, for a reason.
func (f *Files) table(d *directive, room *int) (t *table, why string) {
	t = &table{}
	for _, of := range d.body {
		switch of.words[0] {
		case "no_reverse", "ttl", "fallthrough_unsupported": // what is in it is left whatever they say
		case "reload":
			if every, err := time.ParseDuration(strings.Join(of.words[1:], " ")); err != nil || every <= 0 {
				return nil, fmt.Sprintf("%v: its file is not read again (reload)", of.at)
			}
		case "fallthrough":
			t.fallThrough(of.words[1:])
		default:
			if len(t.through) > 0 || slices.ContainsFunc(of.words, func(w string) bool { return w == "{" || w == "}" }) {
				return nil, fmt.Sprintf("%v: %s is no setting of it", of.at, clip(of.words[0]))
			}
			t.read(strings.Join(of.words, " "))
		}
	}
	at := etcHosts
	if len(d.args) > 0 {
		at = d.args[0]
	}
	text, why := f.text(at)
	if *room -= len(text); why == "" && *room < 0 {
		why = fmt.Sprintf("there are more than %d MiB of such tables", mostHosts>>20)
	}
	if why != "" {
		return nil, why
	}
	t.read(text)
	if at == etcHosts && f.Container.mountOf(at) == nil {
		t.names = append(t.names, "*") // localhost, ip6-localhost ... and the pod's own name
	}
	return t, ""
}

// fallThrough notes for which zones others are asked: the last such setting counts.
func (t *table) fallThrough(args []string) {
	t.through = nil
	if len(args) == 0 {
		t.through = []string{"."}
	}
	for _, text := range args {
		if zone, ok := zoneOf(text); ok {
			t.through = append(t.through, zone)
		}
	}
}

// read takes the entries of a text as of hosts(5). An address that is none is passed over, its
// names are not: more may be left than is necessary.
func (t *table) read(text string) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(" \t\n\v\f\r", r) })
		if len(fields) < 2 {
			continue
		}
		address, _, _ := strings.Cut(fields[0], "%")
		if addr, err := netip.ParseAddr(address); err == nil {
			t.addresses = append(t.addresses, addr.Unmap())
		}
		for _, name := range fields[1:] {
			t.names = append(t.names, strings.TrimSuffix(strings.ToLower(name), "."))
		}
	}
}

// keep drops the names that are not answered for: those in none of the directive's zones, and
// those of which another server is asked.
func (t *table) keep(d *directive, s *server, servers []*server) {
	zones := s.zones
	if len(d.args) > 1 {
		zones = nil
		for _, text := range d.args[1:] {
			zone, ok := zoneOrRange(text)
			if !ok {
				zone = "."
			}
			zones = append(zones, zone)
		}
	}
	t.names = slices.DeleteFunc(t.names, func(name string) bool {
		return answering(servers, name) != s || !slices.ContainsFunc(zones, func(zone string) bool { return within(name, zone) })
	})
}

// fallsThrough says whether others are asked for what a zone has and the table has not.
func (t *table) fallsThrough(zone string) bool {
	return slices.ContainsFunc(t.through, func(through string) bool { return within(zone, through) })
}

// text is what a file of the DNS servers has, "" if it is not there. why says why it is not known.
func (f *Files) text(at string) (text, why string) {
	switch {
	case f.Container == nil:
		return "", f.unknown()
	case !path.IsAbs(at):
		return "", fmt.Sprintf("where %s is, is not known", clip(at))
	}
	at = path.Clean(at)
	m := f.Container.mountOf(at)
	switch {
	case m == nil && at == etcHosts:
		return f.Container.Aliases, f.Container.Hosts
	case m == nil:
		return "", fmt.Sprintf("%s is of the image, for no volume is mounted there", clip(at))
	}
	if odd := m.odd(at); odd != "" {
		return "", odd
	}
	texts, err := f.texts(m)
	if err != nil {
		return "", err.Error()
	}
	return texts[at].text, ""
}

// tabled puts what the tables have into a configuration.
func tabled(d *model.DNS, servers []*server) {
	for _, s := range servers {
		for _, of := range s.directives {
			if of.table != nil {
				d.Hosts = append(d.Hosts, of.table.names...)
				d.HostAddresses = append(d.HostAddresses, of.table.addresses...)
			}
		}
	}
	slices.Sort(d.Hosts)
	d.Hosts = slices.Compact(d.Hosts)
	slices.SortFunc(d.HostAddresses, netip.Addr.Compare)
	d.HostAddresses = slices.Compact(d.HostAddresses)
}
