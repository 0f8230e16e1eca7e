package resolv

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Conf is what a resolv.conf says.
type Conf struct {
	// Servers are the addresses of the name servers, in their order; at most three.
	Servers []netip.Addr
	// Search are the suffixes that are tried, in their order, in lower case and without
	// the final dot.
	Search []string
	// Ndots is how many dots a name has at least that is asked for as it is first.
	Ndots int
}

// Equal says whether two say the same.
func (c Conf) Equal(o Conf) bool {
	return c.Ndots == o.Ndots && slices.Equal(c.Servers, o.Servers) && slices.Equal(c.Search, o.Search)
}

// Limits of resolvers.
const (
	// mostServers are asked (MAXNS, resolv.conf(5)).
	mostServers = 3
	// mostDots is what ndots is cut to (RES_MAXNDOTS, resolv.conf(5)).
	mostDots = 15
	// lineLimit is the longest line that musl reads, without its end; it passes over longer
	// ones (https://git.musl-libc.org/cgit/musl/tree/src/network/resolvconf.c).
	lineLimit = 254
)

// Parse reads a resolv.conf(5). It is an error where the resolvers of glibc, musl and Go
// would not all make the same of it.
func Parse(text string) (Conf, error) {
	c := Conf{Ndots: 1}
	for number, line := range strings.Split(text, "\n") {
		if err := c.line(line); err != nil {
			return Conf{}, fmt.Errorf("line %d: %w", number+1, err)
		}
	}
	return c, nil
}

func (c *Conf) line(line string) error {
	if line == "" || line[0] == '#' || line[0] == ';' {
		return nil
	}
	fields := strings.FieldsFunc(line, isBlank)
	if len(fields) == 0 {
		return nil
	}
	word, rest := fields[0], fields[1:]
	if !slices.Contains([]string{"nameserver", "search", "domain", "options"}, word) {
		return nil
	}
	switch {
	case len(line) > lineLimit:
		return fmt.Errorf("%s: it has %d bytes, and musl reads lines of %d at most", word, len(line), lineLimit)
	case line[0] != word[0]:
		return fmt.Errorf("%s: blanks stand before it", word)
	case len(rest) == 0:
		return fmt.Errorf("%s: nothing follows", word)
	}
	switch word {
	case "nameserver":
		return c.server(rest[0])
	case "options":
		return c.options(rest)
	case "domain":
		if len(rest) > 1 {
			return fmt.Errorf("domain: more than one")
		}
	}
	return c.search(rest)
}

// isBlank says what parts words. Others, as carriage returns, do so for some resolvers only.
func isBlank(c rune) bool { return c == ' ' || c == '\t' }

func (c *Conf) server(text string) error {
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return fmt.Errorf("nameserver: %q is no address", text)
	}
	if len(c.Servers) < mostServers {
		c.Servers = append(c.Servers, addr)
	}
	return nil
}

// search takes a list; the last one counts.
func (c *Conf) search(words []string) error {
	c.Search = nil
	for _, word := range words {
		suffix := strings.ToLower(strings.TrimSuffix(word, "."))
		if !isDomain(suffix) {
			return fmt.Errorf("search: %q is no domain", word)
		}
		c.Search = append(c.Search, suffix)
	}
	return nil
}

func (c *Conf) options(words []string) error {
	for _, word := range words {
		number, found := strings.CutPrefix(word, "ndots:")
		if !found {
			continue
		}
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil {
			return fmt.Errorf("options: %q is no number of dots", word)
		}
		c.Ndots = int(min(n, mostDots))
	}
	return nil
}

// isDomain says whether a name, in lower case, is one of plain labels.
func isDomain(name string) bool {
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return false
		}
		for _, c := range []byte(label) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	return len(name) <= 253
}
