// A question leads to the page that answers it. The reference and the changelog mention everything, and come after it.
// The name of a class or a function still leads to its page: it counts more than a mention in a text.
var Scorer = {
  score: ([page, , , , score]) => (/^(reference\/|changelog$)/.test(page) ? score / 3 : score),
  objNameMatch: 13,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
