package cause

import (
	"cmp"
	"regexp"
	"slices"
	"strings"
)

// plain are names that a shell takes as they are.
var plain = regexp.MustCompile(`^[A-Za-z0-9_.,:@%/+=^-]*$`)

// Quote is a name as a shell (POSIX, 2.2) takes it for one word and no more.
func Quote(name string) string {
	if plain.MatchString(name) {
		return name
	}
	return "'" + strings.ReplaceAll(name, "'", `'\''`) + "'"
}

// quoted makes commands of verdicts safe to be given: whoever may make a device in a pod
// chooses its name, which may hold anything but a slash and white space.
func (d *diagnosis) quoted() {
	var odd []string
	for _, s := range d.Spaces {
		for _, links := range [][]Link{s.Before.Links, s.After.Links} {
			for i := range links {
				if name := links[i].Name; !plain.MatchString(name) {
					odd = append(odd, name)
				}
			}
		}
	}
	// The longest first: one name may be within another.
	slices.SortFunc(odd, func(a, b string) int { return cmp.Or(cmp.Compare(len(b), len(a)), cmp.Compare(a, b)) })
	var pairs []string
	for _, name := range slices.Compact(odd) {
		pairs = append(pairs, name, Quote(name))
	}
	replace := strings.NewReplacer(pairs...)
	for _, v := range d.verdicts {
		v.Fix, v.Undo = replace.Replace(v.Fix), replace.Replace(v.Undo)
	}
}
