package pack

import "regexp"

// secret is a shape of text, and what stays of it.
type secret struct {
	shape *regexp.Regexp
	stays string
}

const (
	gone = "[removed]"
	// called is the name of a secret: password, "token", net.ipv4.tcp_fastopen_key,
	// net.ipv6.conf.all.stable_secret.
	called = `[a-zA-Z0-9_.-]*(?i:passw(?:or)?d|passphrase|secret|token|api_?key|private_?key|fastopen_key|credential)[a-zA-Z0-9_.-]*`
)

// In this order. What is in quotes keeps them, so that JSON stays JSON.
var secrets = []secret{
	// Private keys of PEM (RFC 7468); certificates are public.
	{regexp.MustCompile(`(-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----)[^"]*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|"|$)`), "$1" + gone + "$2"},
	// JSON Web Tokens (RFC 7519), as those of service accounts.
	{regexp.MustCompile(`eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*`), gone},
	// Authorization: Bearer ..., Basic ... (RFC 6750, RFC 7617)
	{regexp.MustCompile(`(?i)(\bbearer\s+|authorization\S*\s*[:=]\s*basic\s+)[A-Za-z0-9+/_.=~-]{8,}`), "$1" + gone},
	// The user and password of a URL (RFC 3986, 3.2.1).
	{regexp.MustCompile(`://[^/\s:@"\\]+:[^/\s@"\\]+@`), "://" + gone + "@"},
	// "token": "..."
	{regexp.MustCompile(`("` + called + `"\s*:\s*")(?:[^"\\]|\\.)+`), "$1" + gone},
	// password='...', and JSON within a string: \"token\": \"...\"
	{regexp.MustCompile(`(` + called + `\\*["']?\s*[:=]\s*\\*["'])(?:[^"'\\]|\\[^"'])+`), "$1" + gone},
	// password=..., token: ...
	{regexp.MustCompile(`(` + called + `\s*[:=]\s*)[^\s"'\\,;{}\[\]]+`), "$1" + gone},
}

// Redact takes out of a text what looks like a secret, and says how many there were.
func Redact(text string) (string, int) {
	removed := 0
	for _, s := range secrets {
		text = s.shape.ReplaceAllStringFunc(text, func(found string) string {
			out := s.shape.ReplaceAllString(found, s.stays)
			if out != found {
				removed++
			}
			return out
		})
	}
	return text, removed
}
